"""A real Trainer on two ranks, with a model made from its configuration: nothing is downloaded."""

import pytest
from system.jobs import wait_until

from ddplog.store.reader import list_runs

pytest.importorskip("torch")

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]  # imports of transformers on a loaded machine

TRAIN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments
import ddplog
from ddplog.huggingface import DdplogCallback


class OwnTrainer(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        if model.training:
            ddplog.log({"rank": self.args.process_index}, weight=1 + self.args.process_index)
        return super().compute_loss(model, inputs, **kwargs)


config = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16,
)
words = torch.arange(8)
trainer = OwnTrainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        output_dir="out", max_steps=4, per_device_train_batch_size=2, logging_steps=2, eval_strategy="steps", eval_steps=4,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, run_name="tiny",
    ),
    train_dataset=[{"input_ids": words, "labels": words}] * 16,
    eval_dataset=[{"input_ids": words, "labels": words}] * 4,
    callbacks=[callback := DdplogCallback(project="digits")],
)
trainer.train()
trainer.predict(trainer.eval_dataset)

# What a hyperparameter search does first in each trial; optuna is not needed for that.
state = TrainerState(is_hyper_param_search=True, trial_name="trial-1")
callback.on_train_begin(trainer.args, state, trainer.control, model=trainer.model)
callback.on_log(trainer.args, state, trainer.control, logs={"loss": 1.0})
"""


def found(job, name):
    return wait_until(lambda: next((run.path for run in list_runs(job.runs) if run.name == name), None))


@pytest.mark.services
def test_what_a_trainer_logs_on_every_rank_is_one_point_a_step(job):
    """What Trainer gathered, and what a rank logs itself at the step that Trainer is at, meet at the same steps."""
    job.run(*job.torchrun(2, job.script(TRAIN)), timeout_s=200, HF_HUB_OFFLINE="1", DDPLOG_RUN_ID=None)
    job.run_dir = found(job, "trial-1")
    with job.open() as run:
        assert (run.project, run.name) == ("digits", "trial-1")
        assert run.metric("train/loss").n.tolist() == [2]
    job.run_dir = found(job, "tiny")
    with job.open() as run:
        assert (run.project, run.name, run.status) == ("digits", "tiny", "finished")
        for key, steps in (
            ("train/loss", [2, 4]),
            ("train/learning_rate", [2, 4]),
            ("train/train_runtime", [4]),
            ("eval/loss", [4]),
            ("test/loss", [4]),
            ("rank", [1, 2, 3, 4]),
        ):
            points = run.metric(key)
            assert (points.step.tolist(), set(points.n.tolist())) == (steps, {2}), key
        loss = run.metric("train/loss")
        assert loss.min.tolist() == loss.max.tolist()
        assert run.metric("rank").value.tolist() == pytest.approx([2 / 3] * 4)
        params = {param.name: param.value for param in run.params()}
        assert run.drops() == ()
        assert run.events() == ()
    assert (params["max_steps"], params["model/hidden_size"], params["model/id2label/0"]) == (4, 8, "LABEL_0")
