"""The commands behind `cloudpubsub`, one module each.  What they share is in `common` and `stop`."""
