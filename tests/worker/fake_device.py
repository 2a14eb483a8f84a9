"""A device whose copies happen when the test says: the code around it is the one that a GPU gets."""

import torch


class Held(torch.Tensor):
    """A tensor that the fake device holds; what torch makes of it is plain."""

    is_cpu = False
    __torch_function__ = torch._C._disabled_torch_function_impl


def on_device(value, dtype=torch.float32):
    """Return a tensor on the fake device."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    return tensor.as_subclass(Held)


class FakeEvent:
    """Happens when complete() is called, and then the copies before it do, not earlier."""

    def __init__(self, copies):
        self.copies = copies
        self.has_happened = False
        self.error = None
        self.num_queries = 0

    def query(self):
        self.num_queries += 1
        if self.error is not None:
            raise self.error
        return self.has_happened

    def complete(self):
        with torch.inference_mode():  # a slot may have been taken in it, and the copy of a GPU does not care
            for to, stacked in self.copies:
                to.copy_(stacked)
        self.copies = []
        self.has_happened = True


class FakeDevice:
    """A stream of copies and events. Host memory that nothing was copied to yet holds 0xAB in every byte."""

    def __init__(self):
        self.events = []
        self.num_allocations = 0
        self.has_graph = False
        self.error = None
        self._copies = []

    def holds(self, tensor):
        return isinstance(tensor, Held)

    def is_capturing(self):
        return self.has_graph

    def allocate(self, num_bytes):
        self.num_allocations += 1
        return torch.full((num_bytes,), 0xAB, dtype=torch.uint8, device="cpu")

    def copy(self, to, stacked):
        if self.error is not None:
            raise self.error
        self._copies.append((to, stacked))

    def record(self, stacked):
        self.events.append(FakeEvent(self._copies))
        self._copies = []
        return self.events[-1]

    @property
    def waiting(self):
        """The events that have not happened."""
        return [event for event in self.events if not event.has_happened]

    def complete(self):
        for event in self.waiting:
            event.complete()
