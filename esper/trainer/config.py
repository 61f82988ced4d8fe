"""Settings of the training loop and the optimizer; those of the learning-rate schedules are beside their rules."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import UserError
from esper.setting_fields import setting

NO_GPU = "trainer.device=cuda, but torch sees no GPU here; use trainer.device=cpu (or auto), or install a torch for your GPU."
NO_HALF = "trainer.precision=fp16 needs a GPU; on the CPU use bf16 or fp32."


@dataclass
class TrainerConfig:
    """How the loop runs. Exactly one of ``steps`` and ``epochs`` is positive."""

    name: str = "default"
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU where there is one")
    precision: str = setting("fp32", choices=("fp32", "bf16", "fp16"), help="autocast type of the forward pass")
    steps: int = setting(2000, low=0, high=10**12, unit="optimizer steps", help="length of the run; 0 where epochs says it")
    epochs: int = setting(0, low=0, high=10**9, unit="epochs", help="length of the run; 0 where steps says it")
    batch_size: int = setting(64, low=1, high=10**9, unit="samples", help="samples of one micro-batch")
    accumulate: int = setting(1, low=1, high=10**6, help="micro-batches to one optimizer step")
    clip: float = setting(1.0, low=0.0, help="largest gradient norm of the host, and of each branch; 0 is off")
    compile: bool = setting(False, help="run the model under torch.compile")
    compile_mode: str = setting(
        "default", choices=("default", "reduce-overhead"), help="torch.compile's mode; reduce-overhead replays captured graphs on a GPU"
    )
    freeze_host: bool = setting(False, help="only what grows learns; the host's weights and norm statistics stay as they are")
    save: bool = setting(True, help="leave the exported model in the run's folder, for esper export and model.weights")
    ema: float = setting(0.0, low=0.0, high=0.999999, help="decay of an average of the weights: it is measured and kept; 0 is off")
    deterministic: bool = setting(True, help="same bits in every run; false may be faster on a GPU")
    threads: int = setting(1, low=0, high=1024, help="CPU threads of torch (part of the bits); 0 leaves torch's own choice")
    num_workers: int = setting(0, low=0, high=256, help="data loader processes; changes no bit")
    validate_every: str = setting("5%", unit="duration", help="time between two looks at the validation set")
    overfit: int = setting(0, low=0, unit="micro-batches", help="train on these first ones only; 0 is off")
    detect_anomaly: bool = setting(False, help="stop at the operation that made a NaN, and name it (slow)")
    debug: bool = setting(False, help="raise what the code of a branch, strategy or controller raises, not go on without it")
    governor: bool = setting(True, help="watch loss, gradients, updates and activations; roll back what goes wrong")
    governor_snapshot: str = setting("1%", unit="duration", help="time between two snapshots in memory that a rollback returns to")
    governor_patience: int = setting(3, low=1, unit="steps", help="steps in a row that loss or gradient may be far out of band")
    governor_failures: int = setting(5, low=1, help="more rollbacks than this within a tenth of the run stop it")
    checkpoint_every: str = setting(
        "10%", unit="duration or empty", help="time between two checkpoints; empty: none, and a killed run starts anew"
    )
    checkpoint_keep: int = setting(2, low=1, help="newest checkpoints to keep")
    checkpoint_best: int = setting(1, low=0, help="checkpoints to keep for their validation metric")
    checkpoint_hours: float = setting(0.0, low=0.0, unit="hours", help="also keep every checkpoint younger than this")
    profile: int = setting(0, low=0, unit="steps", help="write a trace of this many steps to the run's folder; 0 is off")
    control: bool | None = setting(
        None, help="also train the host alone, at the same steps and at the same MACs; null: in a single run, not in a sweep"
    )
    keep: str = setting("grown", choices=("grown", "better"), help="better: the host alone where validation finds the grown one worse")

    def __post_init__(self) -> None:
        """Refuse a run without a length, or with two."""
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError(f"trainer.steps={self.steps} and trainer.epochs={self.epochs}: exactly one must be positive, the other 0.")
        if self.keep == "better" and self.control is False:
            raise UserError(
                "trainer.keep=better compares with the host alone, which trainer.control=false does not train: set trainer.control=true "
                "or trainer.keep=grown."
            )
        if self.freeze_host and self.precision == "fp16":
            raise UserError(
                "trainer.freeze_host=true leaves no gradient for fp16's loss scaling to watch; use trainer.precision=bf16 or fp32."
            )

    @property
    def shards(self) -> int:
        """Micro-batches that are shared out among processes, 0 where the training has one process."""
        return 0

    @property
    def sharded(self) -> bool:
        """Whether several processes share out the host's weights among them."""
        return False

    def steps_per_epoch(self, samples: int) -> int:
        """Optimizer steps of an epoch over this many samples; those left over make none."""
        return max(1, samples // self.batch_size // self.accumulate)

    def total_steps(self, samples: int) -> int:
        """Length of the run over this many training samples [optimizer steps]."""
        return self.steps or self.epochs * self.steps_per_epoch(samples)


@dataclass
class DDPConfig(TrainerConfig):
    """Several processes, started by torchrun, train one model; the bits are the same on every number of them."""

    name: str = "ddp"
    batch_size: int = setting(16, low=1, high=10**9, unit="samples", help="samples of one micro-batch")
    accumulate: int = setting(4, low=1, high=10**6, help="micro-batches to one optimizer step, shared out among the processes")

    def __post_init__(self) -> None:
        """Refuse what has no meaning in several processes so far."""
        super().__post_init__()
        if self.compile:
            raise UserError(f"trainer={self.name} cannot average the telemetry of a compiled model: use trainer.compile=false.")

    @property
    def shards(self) -> int:
        """All micro-batches of a step."""
        return self.accumulate


@dataclass
class FSDPConfig(DDPConfig):
    """As ddp, for hosts that are too large for each process: they share out its weights, gradients and optimizer state (FSDP2)."""

    name: str = "fsdp"

    def __post_init__(self) -> None:
        """Refuse what needs whole weights in every process."""
        super().__post_init__()
        if self.precision == "fp16":
            raise UserError("trainer=fsdp has no loss scaling: use trainer.precision=bf16 or fp32.")
        if self.ema:
            raise UserError("trainer=fsdp keeps no average of the weights, which no process has whole: use trainer.ema=0, or trainer=ddp.")

    @property
    def sharded(self) -> bool:
        """Several processes share out the host."""
        return True


@dataclass
class OptimizerConfig:
    """AdamW or SGD for the host; branches learn by AdamW with the host's factor and their own warm-up."""

    name: str = "adamw"
    lr: float = setting(3e-3, low=0.0, help="learning rate of the host")
    weight_decay: float = setting(0.01, low=0.0, help="decoupled for adamw, L2 for sgd; branches: decoupled")
    momentum: float = setting(0.9, low=0.0, high=0.9999, help="momentum of sgd; β1 of adamw")
    branch_lr: float = setting(3e-3, low=0.0, high=1000.0, help="learning rate of the branches (AdamW)")
    branch_warmup: str = setting("1%", unit="duration", help="a branch's own warm-up after it begins to learn")


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for matrices of host and branches, AdamW for embeddings, the head and vectors, with steps of the same size."""

    name: str = "muon"
    lr: float = setting(3e-3, low=0.0, help="learning rate of the host, for matrices and all others")
    weight_decay: float = setting(0.01, low=0.0, help="decoupled, for host and branches")
    momentum: float = setting(0.95, low=0.0, high=0.9999, help="momentum of Muon")
    branch_lr: float = setting(3e-3, low=0.0, high=1000.0, help="learning rate of the branches, for matrices and all others")
    adamw: list[str] = setting([], help="further parameters of the host for AdamW, by name, with * and ?")
