"""What fails on one rank fails on all: none waits for one that has given up."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Optional, Type

import numpy as np
from mindspore import Tensor

from pangu_locmoe.errors import CheckpointError, LocMoEError
from pangu_locmoe.parallel.communicator import Communicator

_BYTES = 1024
"""Of a message; longer ones are cut."""


@contextmanager
def together(
    communicator: Communicator, kind: Type[LocMoEError] = CheckpointError
) -> Iterator[None]:
    """Around what a rank does alone and may fail at: where one does, all ranks raise what the first
    of them says.

    Every rank of the world enters it, and no collective may be inside.

    Args:
        communicator: of the world.
        kind: what the ranks raise that had no error of their own.
    """
    own: Optional[LocMoEError] = None
    try:
        yield
    except LocMoEError as error:
        own = error
    said = first_failure(communicator, None if own is None else str(own))
    if said is not None:
        raise (kind if own is None else type(own))(said) from None


def first_failure(communicator: Communicator, failure: Optional[str]) -> Optional[str]:
    """What failed on the first rank that has a failure, on every rank the same; None where all
    is well.
    """
    if communicator.size == 1:
        return failure
    content = (failure or "").encode("utf-8", errors="replace")[:_BYTES].ljust(_BYTES, b"\0")
    content_RB = communicator.all_gather(Tensor(np.frombuffer(content, np.int32).copy())).asnumpy()
    for row in content_RB:
        text = row.tobytes().rstrip(b"\0").decode("utf-8", errors="ignore")
        if text:
            return text
    return None
