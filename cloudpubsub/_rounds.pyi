from cloudpubsub._delivery import Pubacks
from cloudpubsub._link import _Inbound
from cloudpubsub._sender import Sender

def rounds(
    sender: Sender, fd: int, wake_fd: int, budget_ms: int, idle_ms: int, patience_us: int
) -> tuple[int, int, int, int, int, bool, bool]: ...
def exchange(
    inbound: _Inbound, acks: Pubacks, fd: int, wake_fd: int, timeout_ms: int
) -> tuple[int, bytearray, int, int, int]: ...
