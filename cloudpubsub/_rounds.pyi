from cloudpubsub._sender import Sender

def rounds(
    sender: Sender, fd: int, wake_fd: int, budget_ms: int, idle_ms: int, patient_inflight: int, patience_us: int
) -> tuple[int, int, int, int, bool]: ...
