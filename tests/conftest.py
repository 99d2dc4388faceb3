"""What holds for all tests."""

import mindspore as ms

# Small operators outside of compiled graphs take half the time of those that are queued. The ranks
# of a job do the same.
ms.runtime.launch_blocking()
