"""The demonstration behind ``cloudpubsub demo``, and the TCP relay that it shares with the tests."""
