"""A run inside a worker process: model, engine, trainer and position, on one rank.

- The position (step, updates, consumed groups, random state) moves only when a step is complete.
- A session opened from a checkpoint continues as if it had never stopped, bit for bit, with the
  same engine and as many ranks.
- Every rank calls every method in the same order; rank 0 alone writes files.
- Weights that were published are those of the checkpoint that is saved before the next step.
"""

import itertools
import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from learner_svc import checkpoint as ckpt
from learner_svc import lora, published
from learner_svc.algo.batch import Pack
from learner_svc.checkpoint_writer import CheckpointWriter, Sizes, Tensors, write_safetensors
from learner_svc.dtypes import computes_in_bf16
from learner_svc.engines.base import Engine, OptimizerState
from learner_svc.engines.plain import PlainEngine
from learner_svc.launch import from_rank_0, own_device
from learner_svc.model import TrainModel, freeze, load_model
from learner_svc.sequence import join
from learner_svc.spec import RunSpec
from learner_svc.trainer import Progress, Reference, Trainer
from regreen.batch import Batch
from regreen.rpc.errors import DiskFull, FailedPrecondition

_RANDOM = "random_state"
_UPDATES = "updates"
_SPARE_BYTES = 8 << 20
_ROUNDING = 1e-5
"""By how much two sums of the same products may differ, of the largest."""


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
        model = _model(spec, resume)
        self._engine = _engine(spec, model, extensions)
        self._trainer = Trainer(spec, self._engine, _reference(spec, model, self._engine))
        self._adapter = lora.config(model, spec.hyperparameters, spec.base_uri)
        self.step_done = 0
        self._published: published.Published | None = None
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
        self._published = None
        groups = [group for group in (group_ids or batch.group_ids) if group]
        self._groups += groups
        self._consumed += len(groups)
        return metrics

    def publish(
        self, checkpoints: Path, policy_version: int, driver_step: int = 0
    ) -> published.Published | None:
        """Write the weights at hand for policies; None on ranks other than 0.

        Raises:
            DiskFull: no space; what was published before is intact.
        """
        self._trainer.policy_version = policy_version
        root = published.beside(checkpoints)
        adapters = self._engine.adapters()
        self._make_room(root, self._weight_bytes() + _bytes_of(adapters))
        weights = self._engine.weights()

        def write(path: Path) -> ckpt.FileEntry:
            notes = {}
            if adapters:
                entry = lora.write(path.parent / ckpt.ADAPTER, self._adapter, adapters)
                notes = {lora.NOTE: entry.sha256}
            return write_safetensors(path, weights, self._weight_sizes(), notes)

        try:
            if self.rank:
                return None
            position = published.Position(
                self.spec.run_id, self.step_done, policy_version, driver_step
            )
            made = published.publish(root, position, self._source, write)
            self._trainer.policy_version = made.position.policy_version
            self._published = made
            return made
        finally:
            _take_rest(weights)

    def save(
        self, root: Path, policy_version: int, keep: int, driver_step: int = 0
    ) -> ckpt.Saved | None:
        """Write a checkpoint; None on ranks other than 0.

        Raises:
            DiskFull: no space; the previous checkpoint is intact.
        """
        self._trainer.policy_version = policy_version
        there = self._published is not None and self._published.file.is_file()
        shared = bool(from_rank_0("shared" if there else ""))
        sizes, state = self._state()
        own = 0 if self._engine.state_format == "adamw" else 16 * self._engine.parameters()[0]
        adapters = self._engine.adapters()
        written = (0 if shared else self._weight_bytes()) + _bytes_of(adapters)
        self._make_room(root, written + own + _bytes(sizes))
        spool = self._spool(root)
        weights = iter(()) if shared else self._engine.weights()
        try:
            if self.rank:
                return None
            with CheckpointWriter(root, self.step_done) as writer:
                writer.add_copies(self._source)
                notes: dict[str, str] = {}
                if adapters:
                    writer.add_directory(
                        ckpt.ADAPTER, lambda path: lora.write(path, self._adapter, adapters)
                    )
                    notes[lora.NOTE] = writer.entry(f"{ckpt.ADAPTER}/{lora.WEIGHTS}").sha256
                if shared and self._published is not None:
                    writer.add_link(ckpt.WEIGHTS, self._published.file, self._published.entry)
                else:
                    writer.add_tensors(ckpt.WEIGHTS, weights, self._weight_sizes(), notes)
                writer.add_tensors(ckpt.TRAINER, state, sizes)
                if spool is not None:
                    writer.add_directory(ckpt.ENGINE, lambda path: _move(spool, path))
                elif self._engine.state_format != "adamw":
                    writer.add_directory(ckpt.ENGINE, self._engine.save_state)
                entry = writer.entry(ckpt.WEIGHTS)
                version = published.named(published.beside(root), policy_version, entry)
                saved = writer.commit(self._manifest(version, driver_step))
        finally:
            _take_rest(weights, state)
        self._trainer.policy_version = version
        self._groups = []
        self._source = saved.path  # the one that a run was resumed from may be pruned
        ckpt.retain(root, keep)
        return saved

    def _make_room(self, root: Path, size_bytes: int) -> None:
        """Clear what dead writers left and see that so much fits; all ranks agree on it.

        Raises:
            DiskFull: on every rank, before any of them writes or waits for another.
        """
        problem = ""
        if self.rank == 0:
            ckpt.sweep(root)
            try:
                ckpt.need_space(root, size_bytes + _SPARE_BYTES)
            except DiskFull as error:
                problem = error.message
        problem = from_rank_0(problem)
        if problem:
            raise DiskFull(problem, retry_after_s=30.0)

    def _weight_sizes(self) -> Sizes:
        shapes = self._engine.weight_shapes()
        return {name: (torch.float32, shape) for name, shape in shapes.items()}

    def _weight_bytes(self) -> int:
        return _bytes(self._weight_sizes())

    def _spool(self, root: Path) -> Path | None:
        """Where every rank has written its shard of an engine's own state, for rank 0 to move into
        the checkpoint; None where there are no shards."""
        if self._engine.state_format == "adamw" or self.world_size == 1:
            return None
        spool = root / f"{ckpt.SHARDS}{self.step_done:08d}"
        self._engine.save_state(spool)
        torch.distributed.barrier()
        return spool

    def _check_base(self, path: Path) -> None:
        """See that adapters stand on the base that they were trained on.

        Raises:
            FailedPrecondition: they do not give the checkpoint's weights; on every rank.
        """
        changed = ""
        with safe_open(path / ckpt.WEIGHTS, framework="pt") as saved:
            for name, value in self._engine.weights():
                then = saved.get_tensor(name)
                apart = (value.float().cpu() - then).abs().max()
                if not changed and apart > _ROUNDING * then.abs().max():
                    changed = name
        if changed:
            raise FailedPrecondition(
                f"{self.spec.base_uri} has another {changed} than the model whose adapters {path} "
                "holds; put that model back, or begin a run from the checkpoint itself"
            )

    def _state(self) -> tuple[Sizes, Iterator[tuple[str, Tensor]]]:
        """Moments and random state; they are gathered as they are taken, by every rank."""
        random = torch.get_rng_state()
        state = OptimizerState(0, {})
        if self._engine.state_format == "adamw":
            state = self._engine.optimizer_state()
        updates = torch.tensor([state.updates, self._trainer.updates])
        sizes: Sizes = {_RANDOM: (random.dtype, tuple(random.shape))}
        sizes |= {name: (torch.float32, shape) for name, shape in state.shapes.items()}
        sizes[_UPDATES] = (updates.dtype, tuple(updates.shape))
        ends = ((_RANDOM, random),), ((_UPDATES, updates),)
        return sizes, itertools.chain(ends[0], state.tensors.items(), ends[1])

    def _manifest(self, policy_version: int, driver_step: int) -> ckpt.Manifest:
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
            driver_step=driver_step,
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
        tensors = Tensors(path / (ckpt.OLD_TRAINER if old else ckpt.TRAINER))
        torch.set_rng_state(tensors[_RANDOM])
        updates = int(tensors[_UPDATES][0])
        if manifest.state_format == "adamw":
            engine.load_optimizer_state(OptimizerState(updates, tensors))
        else:
            engine.load_state(path / ckpt.ENGINE)
        if self.spec.hyperparameters.lora_rank:
            self._check_base(path)
        self._trainer.updates = manifest.updates
        self._trainer.policy_version = manifest.policy_version
        self.step_done = manifest.step
        self._consumed = manifest.consumed_groups

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def _take_rest(*parts: Iterator[Any]) -> None:
    """After a failure of rank 0, and on the others: all ranks gather what there is to the end."""
    for _ in itertools.chain(*parts):
        pass


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _bytes(sizes: Sizes) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in sizes.values())


def _move(source: Path, target: Path) -> None:
    source.rename(target)


def peak_bytes() -> int:
    """The most memory this process has held so far: of its GPU, where it computes on one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def lend_memory() -> None:
    """Give the GPU back what is only kept for the next step; what a run holds stays."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _model(spec: RunSpec, resume: Path | None) -> PreTrainedModel:
    """The model in fp32; that of adapters is their base, with theirs of the checkpoint."""
    hyperparameters = spec.hyperparameters
    adapted = hyperparameters.lora_rank > 0
    model = load_model(Path(spec.base_uri) if resume is None or adapted else resume)
    freeze(model, hyperparameters)
    if adapted and resume is not None:
        kept = resume / ckpt.ADAPTER / lora.WEIGHTS
        if not kept.is_file():
            raise FailedPrecondition(
                f"{resume} holds no adapters, this run trains some; resume without lora_rank, or "
                "begin a run from the checkpoint's weights"
            )
        lora.load_adapters(model, Tensors(kept))
    return model


def _engine(spec: RunSpec, model: PreTrainedModel, extensions: Path) -> Engine:
    hyperparameters = spec.hyperparameters
    dtype = torch.bfloat16 if computes_in_bf16(hyperparameters.dtype) else torch.float32
    if hyperparameters.gradient_checkpointing:
        model.activation_checkpointing_enable(  # type: ignore[no-untyped-call]
            {"use_reentrant": False}
        )
    train = TrainModel(model, join(hyperparameters.sequence_parallel))
    train.to(own_device()).train()
    if spec.engine == "plain":
        return PlainEngine(train, hyperparameters, dtype)
    from learner_svc.engines.deepspeed import DeepSpeedEngine, prepare_environment

    prepare_environment(extensions)
    return DeepSpeedEngine(train, hyperparameters, dtype)


def _reference(spec: RunSpec, trained: PreTrainedModel, engine: Engine) -> Reference | None:
    """The base model as the KL term's reference; None without such a term."""
    if spec.hyperparameters.kl_coefficient <= 0:
        return None
    if spec.hyperparameters.lora_rank:

        def base(pack: Pack) -> Tensor:
            with lora.switched_off(trained):
                return engine.score(pack)

        return base
    model = load_model(Path(spec.base_uri))
    model.requires_grad_(False)
    module = TrainModel(model, join(spec.hyperparameters.sequence_parallel))
    module.to(own_device())

    def score(pack: Pack) -> Tensor:
        with torch.no_grad():
            logprobs: Tensor = module(pack)
            return logprobs

    return score
