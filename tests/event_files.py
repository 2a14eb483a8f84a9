"""Reads TensorBoard event files with TensorBoard's own code."""

from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util import tensor_util


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As EventAccumulator shows them: tag -> (step, value)."""
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def read_as_server(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """As TensorBoard's Python back end sees scalars and texts, which it turns into tensors."""
    accumulator = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }


def read_texts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Texts by tag without the suffix."""
    suffix = "/text_summary"
    return {
        tag.removesuffix(suffix): [(step, text.decode()) for step, text in events]
        for tag, events in read_as_server(folder).items()
        if tag.endswith(suffix)
    }
