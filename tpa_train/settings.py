"""Everything a run can be told, as dataclasses: the schema that the composed recipe is checked against.

The comment above a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpa_train.data.settings import DataSettings
from tpa_train.distillation.modules import OptimizerSettings


@dataclass
class ModelSettings:
    """Which pretrained model is converted."""

    # packaged model that is found without a path (gemma3_270m)
    name: str = "gemma3_270m"
    # a .gguf file, a Hugging Face folder or a gemma_pytorch .ckpt; null finds the packaged model
    path: str | None = None
    # a LoRA adapter to merge into it: the folder that peft wrote
    adapter: str | None = None


@dataclass
class BudgetSettings:
    """What the converted cache may cost, counted in bytes against the original's own windowed bfloat16 cache."""

    # how many times smaller the cache must be
    cache_ratio: float = 4.0
    # tokens of context at which that is counted
    context: int = 32_768
    # widths that cached numbers may have, one or a list out of 16, 8, 6, 4, 3, 2 (group scales are counted); 16 alone
    # spends the budget on ranks only
    bits: Any = field(default_factory=lambda: [16, 8, 6, 4, 3, 2])
    # ranks are multiples of this
    multiple: int = 8
    # forms that compete, out of: latent, joint, contextual, constant_a, dense (keys in fewer bits, values as latents:
    # fastest on a GPU); auto takes joint for one KV head, else all but dense
    forms: Any = "auto"


@dataclass
class CalibrationSettings:
    """The pass over text that the closed-form factors rest on."""

    # tokens to calibrate on
    tokens: int = 262_144
    # tokens on which each truncated layer's effect on the output is measured
    sensitivity_tokens: int = 8_192


@dataclass
class LayerwiseSettings(OptimizerSettings):
    """First recovery stage: every converted attention reproduces the teacher's, layer by layer."""

    # tokens to train on; 0 skips the stage
    tokens: int = 1_638_400
    lr_factors: float = 3e-3


@dataclass
class DistillSettings(OptimizerSettings):
    """Second recovery stage: the whole model's next-token distribution is matched to the teacher's.

    Learning rates are for a student that starts 0.3 nats from the teacher; closer ones learn at lower rates, with the
    root of their KL.
    """

    # tokens to train on; 0 skips the stage
    tokens: int = 16_777_216
    lr_factors: float = 3e-3
    lr_original: float = 3e-5
    # which weights learn: factors, attention (of converted layers), above (all layers from the first converted one),
    # all (everything but the embedding)
    scope: str = "all"
    # weight of the hidden-state loss at the first step; it decays linearly to zero
    hidden_weight: float = 0.1
    # share of the steps after which the hidden-state loss is gone
    hidden_until: float = 0.5
    # the output loss is taken at every so-many-th position; 1 uses all
    kl_every: int = 1
    # the student ends with an average of its weights over the steps, with this decay a step; 0: with the last step's
    ema: float = 0.0
    # what compares the next-token distributions: forward_kl, KL(teacher ‖ student); reverse_kl; or jsd, in between
    divergence: str = "forward_kl"
    # the teacher's share in the mixture that jsd compares both with
    jsd_beta: float = 0.5
    # what both models' logits are divided by; the loss is multiplied by its square
    temperature: float = 1.0
    # weight of the cross-entropy with the text's own next tokens; the divergence gets the rest of 1
    ce_weight: float = 0.0


@dataclass
class TeacherSettings:
    """Keeping what the teacher says of the end-to-end stage's rows, so that training runs without its forward pass.

    It pays where rows are read more than once: several passes over the text, or several runs that share a folder.
    """

    # none; hidden: final hidden states, the same loss as without; topk: the most likely tokens only, far smaller for
    # large models. Needs recipe.distill.hidden_weight=0: layers are compared with a teacher that runs
    cache: str = "none"
    # where it is kept, for any run with the same teacher, text and context; null: teacher_cache in the run folder
    folder: str | None = None
    # topk: how many tokens of each position
    top_k: int = 64
    # auto (float32: the loss starts from the small difference of two hidden states), float32, bfloat16 or float16
    dtype: str = "auto"


@dataclass
class RecipeSettings:
    """Which stages run, and how long each is."""

    name: str = "distill"
    # stages in order, out of: factorize, layerwise, distill
    stages: list[str] = field(default_factory=lambda: ["factorize", "layerwise", "distill"])
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    layerwise: LayerwiseSettings = field(default_factory=LayerwiseSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)


@dataclass
class TrainerSettings:
    """The machine: what runs where, in which precision, in which batches."""

    # auto, cpu or gpu
    accelerator: str = "auto"
    # devices to use on each node, one process each: a number or "auto"; torchrun and SLURM decide it themselves
    devices: Any = 1
    # nodes, each with its own launcher (torchrun or srun)
    num_nodes: int = 1
    # with several devices: ddp (every device holds everything) or fsdp2 (end to end in shards); auto takes ddp
    strategy: str = "auto"
    # auto, bf16 or float32; auto takes bf16 where the hardware has it
    precision: str = "auto"
    # tokens of a training row
    context: int = 4096
    # rows per device and step
    batch_size: int = 4
    # batches whose gradients are added up before an optimizer step
    accumulate: int = 1
    # keep the layers in the host's memory and lend them to the device one at a time; with recipe=factorize only
    offload: bool = False
    # compile the models' passes in stages of 500 steps and more, which win back the minutes of compiling (CUDA); on one
    # device, with accumulate=1 and no images, those of the distill stage are replayed as CUDA graphs
    compile: bool = False
    # keep only the inputs of the student's layers for the backward pass and recompute the rest: less memory, more time
    activation_checkpointing: bool = False
    # a checkpoint is written every so many minutes, besides the one at a signal
    checkpoint_minutes: float = 5.0

    @property
    def rows_per_step(self) -> int:
        """Rows of all devices that one optimizer step takes; ``devices`` must have been counted."""
        return self.batch_size * self.accumulate * self.devices * self.num_nodes


@dataclass
class EvaluationSettings:
    """What is measured after every stage, teacher beside student, on held-out text."""

    # held-out tokens for perplexity, KL and top-1 agreement
    tokens: int = 65_536
    # tokens of a held-out row
    context: int = 8192
    # distances of the copy test, in tokens; those that the model's context cannot hold are refused
    copy: list[int] = field(default_factory=lambda: [1000, 3500])
    # texts per distance
    copy_count: int = 4
    # score about this many tokens of each copy; null scores all
    copy_tokens: int | None = None
    # tokens of each greedy sample continuation; 0 writes none
    sample_tokens: int = 40


@dataclass
class ExportSettings:
    """The inference folder at the end of a run."""

    # auto keeps every weight as it was trained (float32 where it learned); or float32, bfloat16
    dtype: str = "auto"


@dataclass
class LoggerSettings:
    """Where training curves go; csv is always written, the report needs it."""

    # csv, tensorboard, wandb or mlflow
    kind: str = "csv"
    # project name at the service, where it has projects
    project: str = "tpa-train"


@dataclass
class RunSettings:
    """One run of ``scripts/train.py``."""

    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    # everything that the run writes; null makes runs/<model>-<recipe>-<time>
    run_dir: str | None = None
    # go on with the interrupted run in run_dir
    resume: bool = False
    # seeds data order, calibration and training
    seed: int = 0
    # say what the run will take (parameters, memory, time) and stop: no weight is read and nothing is written
    dry_run: bool = False
    # whether --multirun ends by measuring other ways to spend the same bytes: uniform ranks, dense caches in fewer bits
    peers: bool = True
