"""attach() in one process: what is logged, what is not, and that nothing it does reaches training."""

import copy
import gc
import io
import math
import threading
import warnings
import weakref

import pytest

import ddplog
from ddplog.core.records import KIND_SCALARS, KIND_SCHEMA, decode, scan_payload
from ddplog.errors import UsageError
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.worker import current
from ddplog.worker.absent import NullRun
from ddplog.worker.identity import Identity
from ddplog.worker.run import Run

torch = pytest.importorskip("torch")
from ddp.test_clock import Device  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from ddplog.ddp.attachment import Attachment  # noqa: E402
from ddplog.ddp.grad_norm import GradNorm  # noqa: E402

JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip
WHO = Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="env")
PHASES = {"perf/step_s", "perf/forward_s", "perf/backward_s", "perf/optimizer_s", "perf/samples_per_s"}
OPTIM = {"optim/grad_norm", "optim/lr"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    journal = JournalWriter(
        tmp_path / "0.1", b"i" * 16, {"rank": 0, "world_size": 1}, segment_bytes=1 << 20, spool_bytes=1 << 30,
        check=lambda: None,
    )  # fmt: skip
    run = Run(journal, JOB, WHO, strict=True, exit_wait_s=0.0, max_keys=1000)
    monkeypatch.setattr(current, "run", run)
    yield run
    journal.close(finished=False)


def logged(run):
    """Return (step, weight, values) of every record, from the journal."""
    reader, schemas, found = JournalReader(run._journal.folder), {}, []
    while (chunk := reader.read(1 << 20)) is not None:
        for record in (decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)):
            if record.kind == KIND_SCHEMA:
                schemas[record.message["id"]] = record.message["keys"]
            elif record.kind == KIND_SCALARS:
                values = dict(zip(schemas[record.schema_id], record.values, strict=True))
                found.append((record.step, record.weight, values))
    reader.close()
    return found


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.fails = False

    def forward(self, x, scale=1.0):
        if self.fails:
            raise ValueError("planted")
        return self.layers(x) * scale


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def optimizer(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def train(net, optimizer, num_steps=1, batch=6):
    for _ in range(num_steps):
        loss = net(torch.randn(batch, 4)).square().mean()
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()


def test_each_step_of_a_plain_model_is_one_record(run, net, optimizer):
    with ddplog.attach(net, optimizer) as attached:
        train(net, optimizer, 3)

    records = logged(run)
    assert [(step, weight) for step, weight, _ in records] == [(0, 6.0), (1, 6.0), (2, 6.0)]
    assert set(records[0][2]) == PHASES | OPTIM
    assert set(records[1][2]) == PHASES | OPTIM | {"perf/data_s"}
    assert all(math.isfinite(value) for _, _, values in records for value in values.values())
    for _, _, values in records:
        parts = ("perf/forward_s", "perf/backward_s", "perf/optimizer_s", "perf/data_s")
        assert sum(values.get(part, 0.0) for part in parts) <= values["perf/step_s"]
    assert attached.num_errors == 0


def test_the_norm_and_the_rate_are_those_that_the_optimizer_sees(run, net):
    groups = [{"params": [net.layers[0].weight], "name": "first"}, {"params": [net.layers[2].weight], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with ddplog.attach(net, optimizer):
        net(torch.randn(6, 4)).sum().backward()
        nn.utils.clip_grad_norm_([net.layers[0].weight, net.layers[2].weight], 0.25)
        optimizer.step()
    values = logged(run)[0][2]
    assert values["optim/grad_norm"] == pytest.approx(0.25, rel=1e-4)
    assert (values["optim/lr/first"], values["optim/lr/1"]) == (0.1, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_of_mixed_and_missing_gradients(dtype):
    parameters = [nn.Parameter(torch.zeros(50, dtype=dtype)) for _ in range(3)] + [nn.Parameter(torch.zeros(7))]
    for parameter in (parameters[0], parameters[1], parameters[3]):
        parameter.grad = torch.randn_like(parameter)
    whole = torch.cat([parameter.grad.double() for parameter in parameters if parameter.grad is not None])
    assert float(GradNorm(nn.Linear(1, 1)).measure(parameters)) == pytest.approx(float(whole.norm()), rel=1e-5)


def test_no_norm_of_nothing_or_of_sparse_gradients(run):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    with ddplog.attach(table, optimizer) as attached:
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert [set(values) & OPTIM for _, _, values in logged(run)] == [{"optim/lr"}] * 2
    assert attached.num_errors == 0


def test_accumulation_is_one_step(run, net, optimizer):
    with ddplog.attach(net, optimizer):
        for _ in range(2):
            for _ in range(3):
                net(torch.randn(6, 4)).sum().backward()
            optimizer.step()
    assert [(step, weight) for step, weight, _ in logged(run)] == [(0, 18.0), (1, 18.0)]


def test_without_an_optimizer_a_backward_pass_is_a_step(run, net):
    with ddplog.attach(net):
        train(net, None, 2)
    records = logged(run)
    assert [step for step, _, _ in records] == [0, 1]
    assert set(records[1][2]) == PHASES - {"perf/optimizer_s"} | {"perf/data_s", "optim/grad_norm"}


def test_the_ambient_step_counts_if_there_is_one(run, net, optimizer):
    with ddplog.attach(net, optimizer):
        for number in (7, 9):
            run.set_step(number)
            train(net, optimizer)
    assert [step for step, _, _ in logged(run)] == [7, 9]


def test_evaluation_is_no_training(run, net, optimizer):
    with ddplog.attach(net, optimizer):
        train(net, optimizer)
        net.eval()
        net(torch.randn(1000, 4))
        net.train()
        with torch.no_grad():
            net(torch.randn(1000, 4))
        train(net, optimizer)
    (_, first, _), (_, second, values) = logged(run)
    assert first == second == 6.0
    assert "perf/data_s" not in values  # the gap was no wait for data alone


def test_the_loader_is_timed_in_place(run, net, optimizer):
    loader = DataLoader(TensorDataset(torch.randn(12, 4)), 6)
    with ddplog.attach(net, optimizer, loader):
        assert isinstance(loader, DataLoader)
        for (batch,) in loader:
            net(batch).sum().backward()
            optimizer.step()
    assert type(loader) is DataLoader
    assert [values["perf/data_s"] > 0 for _, _, values in logged(run)] == [True, True]


def test_detach_takes_everything_off(run, net, optimizer):
    def state():
        return [
            net._forward_pre_hooks, net._forward_hooks, optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks, [p._post_accumulate_grad_hooks for p in net.parameters()],
        ]  # fmt: skip

    before, threads = copy.copy([dict(part) if not isinstance(part, list) else part for part in state()]), []
    attached = ddplog.attach(net, optimizer)
    out = net(torch.randn(6, 4))
    threads.append(threading.active_count())
    attached.detach()
    attached.detach()
    assert [dict(part) if not isinstance(part, list) else part for part in state()] == before
    out.sum().backward()  # its graph still has a hook of ours
    train(net, optimizer)
    assert logged(run) == []
    assert threads == [1]
    assert "detached" in repr(attached)
    ddplog.attach(net, optimizer).detach()


def test_what_training_computes_is_bit_for_bit_the_same(run):
    def weights(*, is_attached):
        torch.manual_seed(1)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        attached = ddplog.attach(net, optimizer) if is_attached else None
        train(net, optimizer, 20)
        if attached:
            attached.detach()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(is_attached=True), weights(is_attached=False))


def test_what_raises_in_training_raises_as_before_and_the_next_step_counts(run, net, optimizer):
    with ddplog.attach(net, optimizer) as attached:
        net.fails = True
        with pytest.raises(ValueError, match="planted"):
            net(torch.randn(6, 4))
        net.fails = False
        out = net(torch.randn(6, 4))
        out.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
        train(net, optimizer, 2)
    assert [set(values) >= PHASES for _, _, values in logged(run)] == [True, True]
    assert attached.num_errors == 0


def test_a_measurement_that_fails_is_warned_about_once_and_training_goes_on(run, net, optimizer):
    with ddplog.attach(net, optimizer) as attached:
        attached._recorder.forward_starts = lambda *_: 1 / 0
        with pytest.warns(RuntimeWarning, match="a measurement failed.*ZeroDivisionError") as caught:
            train(net, optimizer, 3)
        assert len(caught) == 1
    assert attached.num_errors == 3
    assert len(logged(run)) == 3


def test_with_warnings_as_errors_too(run, net, optimizer, caplog):
    with ddplog.attach(net, optimizer) as attached, warnings.catch_warnings():
        warnings.simplefilter("error")
        attached._recorder.forward_starts = lambda *_: 1 / 0
        train(net, optimizer)
    assert "a measurement failed" in caplog.text


def test_outputs_of_every_shape_and_several_calls(run):
    class Many(Net):
        def forward(self, batch):
            hidden = self.layers(batch["x"])
            return {"loss": hidden.sum(), "parts": [hidden, (batch["x"], 3, None)]}

    net = Many()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with ddplog.attach(net, optimizer):
        first, second = net({"x": torch.randn(5, 4)}), net({"x": torch.randn(5, 4)})
        (first["parts"][0].sum() + second["loss"]).backward()
        optimizer.step()
    ((_, weight, values),) = logged(run)
    assert weight == 10.0
    assert set(values) == PHASES | OPTIM


def test_a_step_that_the_grad_scaler_skips_is_part_of_the_next(run, net, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with ddplog.attach(net, optimizer) as attached:
        for scale in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(net(torch.randn(6, 4)).sum() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
    ((step, weight, values),) = logged(run)
    assert (step, weight) == (0, 12.0)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    assert values["optim/grad_norm"] == pytest.approx(expected)  # unscaled
    assert attached.num_errors == 0


def test_a_copy_and_a_saved_model_are_not_attached(run, net, optimizer):
    """An EMA is a deepcopy of the model that trains; its forward is no step. And a checkpoint needs no ddplog state."""
    attached = ddplog.attach(net, optimizer)
    ema = copy.deepcopy(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    ema(torch.randn(99, 4)).sum().backward()
    train(net, optimizer)
    attached.detach()
    assert [weight for _, weight, _ in logged(run)] == [6.0]


def test_a_model_that_is_dropped_without_detach_is_freed(run):
    """A search over hyperparameters makes one model after the other; each would keep its GPU memory for ever."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ddplog.attach(net, optimizer)
    train(net, optimizer)
    gone = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("is_compiled_first", [True, False])
def test_compiled_models(run, net, optimizer, is_compiled_first):
    """Compiled first, everything is measured. Attached first, our hooks are traced away: no graph break, and no forward."""
    torch._dynamo.reset()
    if is_compiled_first:
        model = torch.compile(net, backend="aot_eager", fullgraph=True)
        attached = ddplog.attach(model, optimizer)
    else:
        attached = ddplog.attach(net, optimizer)
        model = torch.compile(net, backend="aot_eager", fullgraph=True)
    with attached:
        train(model, optimizer, 3)
    records = logged(run)
    assert len(records) == 3
    wanted = PHASES if is_compiled_first else {"perf/optimizer_s"}
    assert all(set(values) >= wanted | OPTIM for _, _, values in records)
    assert attached.num_errors == 0


def test_on_a_gpu_the_times_of_a_step_are_logged_under_its_own_step_when_they_are_known(run, net, optimizer):
    """The code that runs on a GPU, with a fake event: the device gets to step i while step i + 2 is trained."""
    device = Device()
    attached = Attachment(run, net, optimizer, None, parts=frozenset({"grad_norm"}), clock=device.clock())
    ends = []
    for number in range(8):
        train(net, optimizer)
        ends.append(device.now_ms)
        device.now_ms += 1.0
        if number >= 2:
            device.done_until_ms = ends[number - 2]
            attached._recorder._clock.sweep()
        assert len(logged(run)) == max(0, number - 1)
    assert device.num_made < 8 * 8
    attached.detach()
    records = logged(run)
    assert [step for step, _, _ in records] == list(range(8))
    assert all(set(values) >= PHASES | OPTIM for _, _, values in records[:6])
    assert all(set(values) >= {"perf/step_s", "optim/grad_norm"} for _, _, values in records[6:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet"}, r"attach\(model=\.\.\.\): must be a torch\.nn\.Module, not str"),
        ({"optimizer": "adam"}, r"attach\(optimizer=\.\.\.\): must be a torch\.optim\.Optimizer, not str"),
        ({"dataloader": [1]}, r"attach\(dataloader=\.\.\.\): a list cannot be timed"),
        ({"parts": ["comms"]}, r"attach\(parts=\['comms'\]\): must be of comm, grad_norm"),
    ],
)
def test_a_wrong_argument_is_named(run, net, arguments, message):
    with pytest.raises(UsageError, match=message):
        ddplog.attach(**{"model": net, **arguments})
    ddplog.attach(net).detach()  # nothing was left on it


def test_attached_twice_is_said(run, net):
    with ddplog.attach(net), pytest.raises(UsageError, match="attached already"):
        ddplog.attach(net)


def test_without_a_run_the_error_says_what_to_do(monkeypatch, net):
    monkeypatch.setattr(current, "run", None)
    with pytest.raises(UsageError, match=r"call ddplog\.init\(\)"):
        ddplog.attach(net)


def test_with_mode_off_there_is_no_hook(monkeypatch, net, optimizer):
    monkeypatch.setattr(current, "run", NullRun())
    with ddplog.attach(net, optimizer) as attached:
        assert not net._forward_pre_hooks
        train(net, optimizer)
        assert not attached.is_attached
