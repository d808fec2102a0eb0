"""TRL's `SFTTrainer` as the local trainer: two clients, two rounds, beside fedloom's own trainer.

Run it with `python examples/trl_local_trainer.py`; it needs `pip install "fedloom[trl]"`.
"""

import tempfile
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import fedloom

OVERRIDES = [
    "run.rounds=2",
    "run.baselines=[]",
    "run.samples=0",
    "data.num_examples=400",
    "data.num_clients=2",
    "data.partition=iid",
    "local={optimizer: adamw, lr: 3.0e-3, steps: 8, batch_size: 8}",
    "evaluation.every=1",
    "evaluation.generate=false",
]


def make(local: fedloom.LocalRound) -> SFTTrainer:
    """Return the trainer of one client and round: where it starts, its rows, steps and seed are fedloom's."""
    config = SFTConfig(
        output_dir=str(local.folder),
        max_steps=local.steps,
        seed=local.seed,
        learning_rate=local.lr,
        per_device_train_batch_size=local.batch_size,
        lr_scheduler_type="constant",
        completion_only_loss=True,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    names = ("input_ids", "completion_mask")
    rows = Dataset.from_list([{name: row[name] for name in names} for row in local.rows])
    return SFTTrainer(
        model=local.model, args=config, train_dataset=rows, processing_class=local.tokenizer
    )


def main() -> None:
    """Run the same federation with either trainer and print losses, and how long both rounds trained."""
    disable_progress_bars()
    seconds, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trainer in (("fedloom", None), ("TRL", fedloom.hf_trainer(make))):
            result = fedloom.run(
                "quickstart", Path(folder) / name, overrides=OVERRIDES, trainer=trainer
            )
            seconds[name] = result.summary["train_seconds"]
            losses[name] = [row["test/loss"] for row in result.metrics]
    for name, course in losses.items():
        print(f"{name:8} test loss {' -> '.join(f'{loss:.3f}' for loss in course)}")
    ratio = seconds["TRL"] / seconds["fedloom"]
    print(f"two rounds: {seconds['fedloom']:.1f} s, with TRL {seconds['TRL']:.1f} s ({ratio:.1f}x)")


if __name__ == "__main__":
    main()
