"""A hook of a framework that is not installed says what to install; python -S sees no installed package."""

import sys

import pytest

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("module", "package"),
    [("lightning", "lightning (or pytorch-lightning)"), ("huggingface", "transformers"), ("accelerate", "accelerate")],
)
def test_the_package_to_install_is_named(job, module, package):
    _, err = job.run(sys.executable, "-S", "-c", f"import ddplog.{module}", code=1)

    assert err.splitlines()[-1].startswith(f"ImportError: ddplog.{module} needs ")
    assert err.splitlines()[-1].endswith(f"pip install {package}")


def test_the_summary_writer_needs_none(job):
    job.run(sys.executable, "-S", "-c", "import ddplog.tensorboard")
