"""A run inside a worker process: model, engine, trainer and position, on one rank.

- The position (step, updates, consumed groups, random state) moves only when a step is complete.
- A session opened from a checkpoint continues as if it had never stopped, bit for bit, with the
  same engine and as many ranks.
- Every rank calls every method in the same order; rank 0 alone writes files.
"""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learner_svc import checkpoint as ckpt
from learner_svc.algo.batch import Pack
from learner_svc.checkpoint_writer import CheckpointWriter, Sizes, read_tensors, sizes_of
from learner_svc.dtypes import computes_in_bf16
from learner_svc.engines.base import Engine, OptimizerState
from learner_svc.engines.plain import PlainEngine
from learner_svc.launch import from_rank_0, own_device
from learner_svc.model import TrainModel, freeze, load_model
from learner_svc.spec import RunSpec
from learner_svc.trainer import Progress, Reference, Trainer
from regreen.batch import Batch
from regreen.rpc.errors import DiskFull, FailedPrecondition

_RANDOM = "random_state"
_UPDATES = "updates"


@dataclass(frozen=True, slots=True)
class Opened:
    """What is known once a session stands."""

    step: int
    trainable_parameters: int
    parameters: int
    engine: str


class Session:
    """One run on one rank."""

    def __init__(self, spec: RunSpec, extensions: Path, resume: Path | None = None) -> None:
        """Load the model, build the engine, and take up `resume` if given.

        Raises:
            NotFound, DataLoss: the model or checkpoint is missing or damaged.
            FailedPrecondition: the checkpoint was written by another kind of engine.
        """
        self.spec = spec
        manifest = None
        if resume is not None:
            manifest = ckpt.load_manifest(resume)
            ckpt.verify(resume, manifest)
        self._source = resume or Path(spec.base_uri)
        torch.manual_seed(spec.hyperparameters.seed)
        self._engine = _engine(spec, self._source, extensions)
        self._trainer = Trainer(spec, self._engine, _reference(spec))
        self.step_done = 0
        self._groups: list[str] = []
        self._consumed = 0
        if resume is not None and manifest is not None:
            self._restore(resume, manifest)

    @property
    def rank(self) -> int:
        """This process among the run's."""
        return self._engine.rank

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self._engine.world_size

    def opened(self) -> Opened:
        """What the service reports of a fresh session."""
        trained, everything = self._engine.parameters()
        return Opened(self.step_done, trained, everything, self._engine.name)

    def step(self, batch: Batch, group_ids: Sequence[str], progress: Progress) -> dict[str, float]:
        """Do the next step."""
        metrics = self._trainer.step(batch, progress) | {"peak_memory_bytes": float(peak_bytes())}
        self.step_done += 1
        groups = [group for group in (group_ids or batch.group_ids) if group]
        self._groups += groups
        self._consumed += len(groups)
        return metrics

    def save(self, root: Path, policy_version: int, keep: int) -> ckpt.Saved | None:
        """Write a checkpoint; None on ranks other than 0.

        Raises:
            DiskFull: no space; the previous checkpoint is intact.
        """
        self._trainer.policy_version = policy_version
        self._make_room(root)
        if self._engine.state_format != "adamw" and self.world_size > 1:
            return self._save_sharded(root, policy_version, keep)
        if self.rank:
            self._follow_weights()
            return None
        return self._write(root, policy_version, keep, None)

    def _make_room(self, root: Path) -> None:
        """Clear what dead writers left and see that a checkpoint fits; all ranks agree on it.

        Raises:
            DiskFull: on every rank, before any of them writes or waits for another.
        """
        problem = ""
        if self.rank == 0:
            ckpt.sweep(root)
            try:
                ckpt.need_space(root, self._size_bytes())
            except DiskFull as error:
                problem = error.message
        problem = from_rank_0(problem)
        if problem:
            raise DiskFull(problem, retry_after_s=30.0)

    def _size_bytes(self) -> int:
        """What a checkpoint takes, about: an engine's own format has 16 bytes per parameter."""
        shapes = self._engine.weight_shapes().values()
        weights = sum(4 * torch.Size(shape).numel() for shape in shapes)
        state = sum(tensor.nbytes for tensor in self._tensors().values())
        own = 0 if self._engine.state_format == "adamw" else 16 * self._engine.parameters()[0]
        return weights + state + own + (8 << 20)

    def _save_sharded(self, root: Path, policy_version: int, keep: int) -> ckpt.Saved | None:
        """Every rank writes its shard into a spool that rank 0 then moves into the checkpoint."""
        spool = root / f"{ckpt.SHARDS}{self.step_done:08d}"
        self._engine.save_state(spool)
        torch.distributed.barrier()
        if self.rank:
            self._follow_weights()
            return None
        return self._write(root, policy_version, keep, spool)

    def _follow_weights(self) -> None:
        """Take part in gathering the weights that rank 0 writes."""
        for _ in self._engine.weights():
            pass

    def _write(self, root: Path, policy_version: int, keep: int, spool: Path | None) -> ckpt.Saved:
        sizes: Sizes = {
            name: (torch.float32, shape) for name, shape in self._engine.weight_shapes().items()
        }
        state = self._tensors()
        weights = self._engine.weights()
        with CheckpointWriter(root, self.step_done) as writer:
            try:
                writer.add_copies(self._source)
                writer.add_tensors(ckpt.WEIGHTS, weights, sizes)
            finally:
                # After a failure the other ranks still wait to gather the rest.
                for _ in weights:
                    pass
            writer.add_tensors(ckpt.TRAINER, state.items(), sizes_of(state))
            if spool is not None:
                writer.add_directory(ckpt.ENGINE, lambda path: _move(spool, path))
            elif self._engine.state_format != "adamw":
                writer.add_directory(ckpt.ENGINE, self._engine.save_state)
            saved = writer.commit(self._manifest(policy_version))
        self._groups = []
        self._source = saved.path  # the one that a run was resumed from may be pruned
        ckpt.retain(root, keep)
        return saved

    def _tensors(self) -> dict[str, Tensor]:
        """Moments and random state."""
        tensors = {_RANDOM: torch.get_rng_state()}
        updates = 0
        if self._engine.state_format == "adamw":
            state = self._engine.optimizer_state()
            tensors |= state.tensors
            updates = state.updates
        return tensors | {_UPDATES: torch.tensor([updates, self._trainer.updates])}

    def _manifest(self, policy_version: int) -> ckpt.Manifest:
        return ckpt.Manifest(
            run_id=self.spec.run_id,
            step=self.step_done,
            updates=self._trainer.updates,
            policy_version=policy_version,
            created=ckpt.now(),
            spec=self.spec.to_json(),
            state_format=self._engine.state_format,
            group_ids=tuple(self._groups),
            consumed_groups=self._consumed,
        )

    def _restore(self, path: Path, manifest: ckpt.Manifest) -> None:
        engine = self._engine
        if manifest.state_format not in engine.reads:
            raise FailedPrecondition(
                f"{path} holds optimizer state of format {manifest.state_format}, this run reads "
                f"{' and '.join(engine.reads)}; resume with the same engine, zero_stage and "
                "processes"
            )
        old = ckpt.OLD_TRAINER in manifest.files
        tensors = read_tensors(path / (ckpt.OLD_TRAINER if old else ckpt.TRAINER))
        torch.set_rng_state(tensors.pop(_RANDOM))
        updates = int(tensors.pop(_UPDATES)[0])
        if manifest.state_format == "adamw":
            engine.load_optimizer_state(OptimizerState(updates, tensors))
        else:
            engine.load_state(path / ckpt.ENGINE)
        self._trainer.updates = manifest.updates
        self._trainer.policy_version = manifest.policy_version
        self.step_done = manifest.step
        self._consumed = manifest.consumed_groups

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def _move(source: Path, target: Path) -> None:
    source.rename(target)


def peak_bytes() -> int:
    """The most memory this process has held so far: of its GPU, where it computes on one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _engine(spec: RunSpec, source: Path, extensions: Path) -> Engine:
    hyperparameters = spec.hyperparameters
    dtype = torch.bfloat16 if computes_in_bf16(hyperparameters.dtype) else torch.float32
    model = load_model(source)
    freeze(model, hyperparameters.trainable_layers)
    if hyperparameters.gradient_checkpointing:
        model.activation_checkpointing_enable(  # type: ignore[no-untyped-call]
            {"use_reentrant": False}
        )
    train = TrainModel(model)
    train.to(own_device()).train()
    if spec.engine == "plain":
        return PlainEngine(train, hyperparameters, dtype)
    from learner_svc.engines.deepspeed import DeepSpeedEngine, prepare_environment

    prepare_environment(extensions)
    return DeepSpeedEngine(train, hyperparameters, dtype)


def _reference(spec: RunSpec) -> Reference | None:
    """The base model as the KL term's reference; None without such a term."""
    if spec.hyperparameters.kl_coefficient <= 0:
        return None
    model = load_model(Path(spec.base_uri))
    model.requires_grad_(False)
    module = TrainModel(model)
    module.to(own_device())

    def score(pack: Pack) -> Tensor:
        with torch.no_grad():
            logprobs: Tensor = module(pack)
            return logprobs

    return score
