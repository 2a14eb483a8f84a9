"""Which GPU is whose: CUDA's rules, as its documentation and torch have them."""

import pytest

from ddplog.sampling.assign import Gpu, Instance, assigned, visible

A, B, C = (Gpu(uuid=f"GPU-{letter * 8}-1111") for letter in "abc")
TWIN = Gpu(uuid="GPU-aaaa0000-2222")
PARTS = tuple(Instance(uuid=f"MIG-{n}{n}{n}{n}", gpu_instance=n, compute_instance=0) for n in (1, 2))
SPLIT = Gpu(uuid="GPU-dddddddd-1111", is_split=True, instances=PARTS)
EMPTY = Gpu(uuid="GPU-eeeeeeee-1111", is_split=True)

TABLE = {
    "not set: all": (None, [A, B, C], "abc"),
    "empty: none": ("", [A, B, C], ""),
    "minus one: none": ("-1", [A, B, C], ""),
    "not a number: none": ("none", [A, B, C], ""),
    "one": ("1", [A, B, C], "b"),
    "in its own order": ("2,0,1", [A, B, C], "cab"),
    "with spaces": (" 2 , 0", [A, B, C], "ca"),
    "as strtoul reads them": ("1gpu2,2ampere,+0", [A, B, C], "bca"),
    "a negative one ends the list": ("1,-1,2", [A, B, C], "b"),
    "one that is not there ends the list": ("1,7,2", [A, B, C], "b"),
    "a word ends the list": ("1,x,2", [A, B, C], "b"),
    "a gap ends the list": ("1,,2", [A, B, C], "b"),
    "one that comes twice: none": ("1,2,1", [A, B, C], ""),
    "by UUID": ("GPU-bbbbbbbb-1111,GPU-aaaaaaaa-1111", [A, B, C], "ba"),
    "by the beginning of a UUID": ("GPU-b,GPU-c", [A, B, C], "bc"),
    "of a beginning that two have, none": ("GPU-a", [A, TWIN], ""),
    "of a beginning that two have, the list ends": ("GPU-b,GPU-a", [A, B, TWIN], "b"),
    "an unknown UUID ends the list": ("GPU-b,GPU-9,GPU-c", [A, B, C], "b"),
    "UUIDs and indices do not mix": ("GPU-b,2", [A, B, C], "b"),
    "the same GPU under two names: none": ("GPU-b,GPU-bb", [A, B, C], ""),
    "without GPUs": (None, [], ""),
    "an index without GPUs": ("0", [], ""),
}


@pytest.mark.parametrize(("setting", "gpus", "expected"), TABLE.values(), ids=TABLE)
def test_what_a_process_may_use(setting, gpus, expected):
    found = visible(gpus, setting)
    assert "".join(uuid[4] for uuid in found) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ["MIG-1111"]),  # one instance is all that a process can use
        ("MIG-2222", ["MIG-2222"]),
        ("MIG-2222,MIG-1111", ["MIG-2222"]),
        ("MIG-2", ["MIG-2222"]),
        ("MIG-GPU-dddddddd-1111/2/0", ["MIG-2222"]),
        ("MIG-GPU-dddddddd-1111/3/0", []),
        ("MIG-GPU-aaaaaaaa-1111/2/0", []),
        ("MIG-9", []),
        ("MIG-2,MIG-2222", []),
        ("GPU-a", ["GPU-aaaaaaaa-1111"]),
        ("GPU-d", []),  # a split GPU computes nothing itself
        ("1", ["MIG-1111"]),
        ("0", ["GPU-aaaaaaaa-1111"]),
    ],
)
def test_what_a_process_may_use_where_gpus_are_split(setting, expected):
    assert list(visible([A, SPLIT], setting)) == expected


def test_a_split_gpu_without_instances_is_nobodys():
    assert visible([EMPTY], None) == ()
    assert visible([EMPTY, A], "0") == ()


@pytest.mark.parametrize(
    ("devices", "local_rank", "computing", "expected"),
    [
        ((), 0, (), None),
        (("a",), 5, (), "a"),  # every rank sees one
        (("a", "b", "c"), 1, (), "b"),
        (("a", "b"), 5, (), "b"),
        (("a", "b", "c"), 0, ("c",), "c"),  # where it computes
        (("a", "b", "c"), 0, ("z",), "a"),  # NVML's pids are another namespace's, or it computes elsewhere
        (("a", "b", "c"), 1, ("a", "b"), "b"),  # it touched GPU 0 as well, as many programs do
        (("a", "b", "c"), 0, ("b", "c"), "b"),
    ],
)
def test_which_of_them_is_the_ranks_own(devices, local_rank, computing, expected):
    assert assigned(devices, local_rank, computing) == expected


@pytest.mark.parametrize("name", [name for name, (setting, gpus, _) in TABLE.items() if setting is not None and gpus])
def test_torch_reads_the_list_likewise(name, monkeypatch):
    """torch does it without CUDA, for its own device_count()."""
    torch = pytest.importorskip("torch")
    setting, gpus, expected = TABLE[name]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    parsed = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        parsed = torch.cuda._transform_uuid_to_ordinals(parsed, [gpu.uuid for gpu in gpus])
    known = []
    for number in parsed:
        if number >= len(gpus):
            break
        known.append(number)
    assert "".join(gpus[number].uuid[4] for number in known) == expected
