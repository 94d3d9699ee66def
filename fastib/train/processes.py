"""The end of a run of several processes."""

import gc


def leave_process_group() -> None:
    """Leave the process group, where there is one, and end its threads.

    A thread of gloo that still holds tensors when Python ends aborts the process, and torchrun then calls a run that
    has written its result failed. A trainer is a cycle that holds the group; without the collection it outlives it.
    """
    import torch  # here, for a command line that answers --help at once

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
