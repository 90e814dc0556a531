"""Running out of memory is recognised by the words of every allocator of torch."""

from __future__ import annotations

import pytest
import torch

from sinkscope.devices import in_pieces, ran_out_of_memory

SAID = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
)


@pytest.mark.parametrize("error", SAID)
def test_pieces_shrink_for_every_allocator(error: RuntimeError) -> None:
    sizes = []

    def work(at: slice) -> torch.Tensor:
        sizes.append(at.stop - at.start)
        if sizes[-1] > 2:
            raise error
        return torch.arange(at.start, at.stop)

    assert in_pieces(5, 4, work).tolist() == [0, 1, 2, 3, 4] and sizes == [4, 2, 2, 1]


def test_what_the_allocator_of_this_machine_says_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
    assert not ran_out_of_memory(RuntimeError("shapes cannot be multiplied"))
