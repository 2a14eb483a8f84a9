"""The same on a real GPU: nothing synchronizes, in a mode in which torch raises where something does."""

import time
import warnings

import pytest

torch = pytest.importorskip("torch")

from worker.test_pending import EXACT, new_run, num_unarrived, values  # noqa: E402 - they need torch

from ddplog.worker.device import Cuda  # noqa: E402
from ddplog.worker.pending import Pending  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def run(tmp_path):
    run = new_run(tmp_path / "0.1", segment_bytes=16 << 20)
    run._pending = Pending(run._journal, Cuda())
    yield run
    run._journal.close(finished=False)


@pytest.fixture
def no_sync(run):
    """The first call allocates pinned memory, which may synchronize."""
    run.log({"first": torch.ones((), device="cuda")}, step=0)
    run.flush()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_thousand_steps_synchronize_nothing(run, no_sync):
    model = torch.nn.Linear(64, 64).cuda()
    for step in range(1000):
        loss = model(torch.ones(8, 64, device="cuda")).mean()
        run.set_step(step)
        run.log(
            {"loss": loss, "step": torch.full((1,), step, device="cuda"), "host": 0.5},
            weight=torch.ones((), device="cuda"),
        )
    torch.cuda.set_sync_debug_mode("default")
    run.flush()

    found = values(run)[1:]
    assert [item["step"] for item in found] == list(range(1000))
    assert dict(run.drops) == {}


def test_the_call_returns_before_the_value_is_there(run, no_sync):
    value = torch.zeros((), device="cuda")
    torch.cuda._sleep(int(2e9))  # about a second
    value += 5
    start = time.perf_counter()
    run.log({"x": value}, step=1)
    value.fill_(-1.0)
    del value
    trash = [torch.full((), 77.0, device="cuda") for _ in range(100)]
    took_s = time.perf_counter() - start
    was_pending = num_unarrived(run)
    torch.cuda.set_sync_debug_mode("default")
    run.flush()

    assert (was_pending, values(run)[-1]) == (1, {"x": 5.0}), (took_s, len(trash))


@pytest.mark.parametrize(
    ("dtype", "numbers"), EXACT, ids=lambda value: str(value) if not isinstance(value, list) else ""
)
def test_every_type_arrives_as_it_was(run, dtype, numbers):
    tensors = [torch.tensor(number, dtype=dtype, device="cuda") for number in numbers]
    run.log({f"k{i}": tensor for i, tensor in enumerate(tensors)}, step=1)
    run.flush()

    assert list(values(run)[-1].values()) == [float(tensor.item()) for tensor in tensors]


def test_the_callers_stream_counts(run):
    streams = [torch.cuda.Stream() for _ in range(4)]
    for step in range(100):
        with torch.cuda.stream(streams[step % 4]):
            value = torch.full((), float(step), device="cuda")
            torch.cuda._sleep(100_000 * (3 - step % 4))
            run.log({"x": value}, step=step)
            value.record_stream(streams[step % 4])
    run.flush()

    assert [item["x"] for item in values(run)] == list(map(float, range(100)))


def test_a_capture_is_left_alone(run):
    """It goes through, although something waits; what was logged in it is counted."""
    value = torch.ones((), device="cuda")
    run.log({"x": value}, step=0)
    run.flush()
    torch.cuda._sleep(int(5e8))
    run.log({"x": value}, step=1)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(record=True) as seen, torch.cuda.graph(graph):
        warnings.simplefilter("always")
        result = value * 2
        run.log({"x": result, "host": 1.0}, step=2)
    assert ["CUDA graph" in str(warning.message) for warning in seen] == [True]
    graph.replay()
    run.log({"x": result}, step=3)
    run.flush()

    assert values(run) == [{"x": 1.0}, {"x": 1.0}, {"host": 1.0}, {"x": 2.0}]
    assert run.drops == {"graph_capture": 1}
