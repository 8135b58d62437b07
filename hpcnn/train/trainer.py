"""The training loop: one step, its bookkeeping, and what happens between epochs.

Life of a step: batch -> program (forward, backward, gradients handed over) -> exchange -> update -> one small message
in which the ranks add up loss and answers and agree whether anyone failed or was asked to stop.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import numpy as np

from hpcnn import configuration, gpu
from hpcnn.arrays import Array
from hpcnn.comm.engine import URGENT
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.data.loader import Loader
from hpcnn.errors import ConfigError, NumericsError
from hpcnn.ops import squared_norm
from hpcnn.parallel.whole import Whole
from hpcnn.plan import planner
from hpcnn.timeline import Timeline
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import learning_rate, optimizers, reproducible
from hpcnn.train.evaluate import Score, evaluate_shares
from hpcnn.train.feed import Feed
from hpcnn.train.kept import Keeper
from hpcnn.train.metrics import MetricsWriter, peak_memory_bytes, read, summarise
from hpcnn.train.observer import Observer
from hpcnn.train.outcome import Outcome
from hpcnn.train.progress import Progress
from hpcnn.train.rules import Record, make_rule
from hpcnn.train.setup import Parts, batch_part
from hpcnn.train.signals import EXIT_STOPPED, StopRequest
from hpcnn.train.update import StepUpdate

EXIT_RUN_AGAIN = EXIT_STOPPED


class Trainer:
    """One run in one folder.

    Parameters
    ----------
    parts : Parts
        Data, model and program.
    folder : Path
        Where config.toml, plan.toml, metrics.jsonl, checkpoints/ and final.h5 go; rank 0 writes.
    progress_stream, result_stream : TextIO
        Where rank 0 shows progress and writes the results of epochs.
    observers : sequence of Observer
        Look at the network between steps.
    """

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        *,
        progress_stream: TextIO,
        result_stream: TextIO,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.world = parts.world
        self.program = parts.program
        self.folder = folder
        self.observers = observers
        self.writes = self.world.rank == 0
        self.step = 0
        self.best_accuracy = 0.0
        self.request = StopRequest()
        self.keeper: Keeper | None = None
        self._store: checkpoints.Store | None = None
        self._metrics: MetricsWriter | None = None
        self._progress = Progress(
            progress_stream if self.writes else None,
            result_stream if self.writes else None,
            every_seconds=self.config.log.every_seconds,
        )
        self.timeline = Timeline(num_steps=self.config.log.trace_steps)
        if self.config.device == "cuda":
            self.timeline.marks = gpu.Ranges()
        self.program.timeline = self.timeline
        for world in parts.groups.worlds:
            world.engine.timeline = self.timeline
        self.optimizer = optimizers.build(self.config.train, parts.model.parameters)
        self.rule = make_rule(parts, self.optimizer)
        self.whole = Whole(parts.model, self.program.plan, self.program.world)
        # Of a step: correct answers, requests to stop, failed loaders, what features add to the loss; and the loss, in
        # parts that are summed apart.
        self._totals = np.zeros(4 + len(self.program.losses))
        self._sum_totals = prepare_allreduce(
            self.world.engine, self._totals, "butterfly", label="loss and correct answers", priority=URGENT
        )
        self.rate = learning_rate.build(
            parts.recipe, steps_per_epoch=parts.steps_per_epoch, total_steps=parts.total_steps
        )

    # -- before -----------------------------------------------------------------------------------------------------

    def prepare(
        self, *, resume: bool = False, init: Path | None = None, kept: checkpoints.Checkpoint | None = None
    ) -> None:
        """Make or re-open the run folder, and load a checkpoint where one is asked for (collective).

        What rank 0 passes as `kept` goes before the newest file of the folder.

        Raises
        ------
        ConfigError
            If the folder holds a run already and `resume` was not asked for.
        CheckpointError
            If a checkpoint is damaged or of another model.
        """
        with self.world.agreeing():
            if self.writes:
                self._open_folder(resume)
        if resume:
            with self.world.agreeing():
                loaded = (kept or self._newest()) if self.writes else None
            self._restore(loaded, parameters_only=False)
        if init is not None and self.step == 0:
            with self.world.agreeing():
                loaded = checkpoints.load(init, parameters_only=True) if self.writes else None
            self._restore(loaded, parameters_only=True)
        with self.world.agreeing():
            if self.writes:
                self._metrics = MetricsWriter(
                    self.folder, resumed_step=self.step if resume else None, tensorboard=self.config.log.tensorboard
                )
        for observer in self.observers:
            observer.begin(self.folder, self.step)
        if self.config.fault.on_rank_failure == "continue":
            self.keeper = Keeper(self.parts, self.optimizer.state)
            self.keeper.keep(self.step, self.best_accuracy)

    def say(self, words: str) -> None:
        """Show a line among the progress."""
        self._progress.message(words)

    def _open_folder(self, resume: bool) -> None:
        if (self.folder / "metrics.jsonl").exists() and not resume:
            raise ConfigError(
                f"train: '{self.folder}' holds a run already; runs are not overwritten."
                " Add --resume to go on with it, or choose another --out."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(configuration.to_toml(self.config))
            (self.folder / "plan.toml").write_text(planner.to_toml(self.program.plan))
        except OSError as error:
            raise ConfigError(f"train: cannot write the run folder '{self.folder}': {error}.") from None
        self._store = checkpoints.Store(self.folder, self.config.checkpoint.keep)

    def _newest(self) -> checkpoints.Checkpoint | None:
        """Return the run's newest good checkpoint, or None before the first."""
        found = reproducible.to_resume(self.folder, self.parts.train_data.fingerprint(), self.parts.arithmetic)
        if found is None:
            return None
        if found.warning:
            self._progress.message(f"hpcnn: warning: {found.warning} Going on from {found.checkpoint.path}.")
        return found.checkpoint

    def _restore(self, loaded: checkpoints.Checkpoint | None, *, parameters_only: bool) -> None:
        """Put a checkpoint that rank 0 read into every rank (collective)."""
        model = self.parts.model
        room = self.whole.room({}, {}) if parameters_only else self.whole.room(self.optimizer.state, model.statistics)
        with self.world.agreeing():
            if loaded is not None:
                checkpoints.restore_into(
                    loaded,
                    model=model.spec.name,
                    parameters=room.parameters,
                    statistics=None if parameters_only else room.statistics,
                    optimizer=None if parameters_only else room.state,
                )
        mine = None
        if loaded is not None:
            mine = loaded.step, loaded.best_accuracy, loaded.lazy_steps, loaded.average
        found = self.world.broadcast_obj(mine)
        if found is None:
            return
        step, best, lazy_steps, average = found
        arrays = [room.parameters.values]
        if not parameters_only:
            arrays += [*room.statistics.values(), *room.state.values()]
            self.step, self.best_accuracy = step, best
            self.program.exchange.resume_rounds(lazy_steps)
            self.rule.restore(average)
        for array in arrays:
            self.world.broadcast(array)
        self.whole.take(room, self.optimizer.state)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run all steps that are left (collective).

        Raises
        ------
        NumericsError
            On every rank, when the loss or the gradient is no longer finite; checkpoints on disk stay as they are.
        DataError
            On every rank, when any rank cannot read its samples.
        """
        total, every = self.parts.total_steps, self.config.checkpoint.every_steps
        score, stopped = None, ""
        self._progress.start(total, initial=self.step)
        with self._progress, self._loader() as loader, self.request as request:
            feed = Feed(iter(loader), self.timeline, self.program.upload)
            if self.step < total:
                feed.fetch()
                self.world.agree(feed.error)
            if self.step == 0:
                self._observe()
            while self.step < total and not stopped:
                self.program.exchange.ends_round = self._ends_epoch(self.step + 1) or _due(self.step + 1, every)
                with self.timeline.step(self.step + 1):
                    stopped = self._step(feed, request)
                self._observe()
                if not self.program.exchange.complete:
                    stopped = ""  # the request stands until the round is over
                save = bool(stopped) or _due(self.step, every)
                ends_epoch = self._ends_epoch(self.step)
                keep = self.keeper is not None and self.keeper.due(self.step)
                if save or ends_epoch or keep:
                    self.program.exchange.settle()
                    self.program.average_statistics()
                if save or ends_epoch:
                    for observer in self.observers:
                        observer.settle()
                    with self.rule.averaged() as record:
                        self._note_average(record)
                        if ends_epoch:
                            score = self._end_of_epoch(save=save) or score
                        else:
                            self.save()
                if keep and self.keeper is not None:
                    self.keeper.keep(self.step, self.best_accuracy)
        return self._finish(score, stopped)

    def _observe(self) -> None:
        """Show the network to the observers whose turn it is, with all parameters current."""
        for observer in self.observers:
            if observer.due(self.step):
                self.program.exchange.settle()
                observer.observe(self.step)

    def _step(self, feed: Feed, request: StopRequest) -> str:
        """Make one update; return the reason to stop, if any rank has one."""
        program, train, batch, images = self.program, self.config.train, feed.batch, feed.images
        self.world.watchdog.doing = f"step {self.step + 1}"
        begin, before, wait_before = time.perf_counter(), self.parts.groups.communication, feed.wait_seconds
        context = program.context(
            training=True,
            seed=train.seed,
            step=self.step,
            samples=batch.samples,
            global_batch=self.parts.recipe.global_batch,
        )
        update, totals, term = self._update(), self._totals, program.feature_loss

        def between(loss: float, num_correct: int) -> None:
            """Fetch the next batch, and have the ranks' totals travel ahead of all gradients."""
            if self.step + 1 < self.parts.total_steps:
                feed.fetch()
            totals[:4] = num_correct, request.requested, feed.error is not None, term.value if term else 0.0
            totals[4:] = program.losses
            self._sum_totals.start()

        with self._agreeing_on_norms():
            program.train_step(images, batch.labels, context, update, between)
        self._sum_totals.wait()
        loss = math.fsum(totals[4:]) / self.parts.groups.count
        self._check(loss, feed)
        self.step += 1
        if self.rule.settles(self.step):
            program.exchange.settle()
            self._note_average(self.rule.after_step(self.step))
        if self._metrics is not None:
            step_s = time.perf_counter() - begin
            spent, wait_s = self.parts.groups.communication - before, feed.wait_seconds - wait_before
            shown = {
                "loss": loss,
                "accuracy": totals[0] / train.global_batch,
                "images_per_second": train.global_batch / step_s,
                "lr": update.lr,
            } | ({"separation": totals[3]} if term else {})
            self._metrics.write(
                "step",
                self.step,
                epoch=self._epoch,
                **shown,
                step_s=step_s,
                compute_s=max(0.0, step_s - spent.exposed_s - wait_s),
                exposed_comm_s=spent.exposed_s,
                hidden_comm_s=spent.hidden_s,
                input_wait_s=wait_s,
                bytes_sent=spent.traffic.num_bytes,
                messages_sent=spent.traffic.num_messages,
            )
            self._progress.step(self.step, **shown)
        return (request.reason or "a signal to another rank") if totals[1] else ""

    def _agreeing_on_norms(self) -> AbstractContextManager[None]:
        """Return what makes all groups raise when one finds a gradient that is no number; in one group all do."""
        alone = self.parts.groups.count == 1 or not self.config.train.clip_norm
        return nullcontext() if alone else self.world.agreeing()

    def _note_average(self, record: Record | None) -> None:
        if record is not None and self._metrics is not None:
            self._metrics.write("average", self.step, epoch=self._epoch, **record)

    def _check(self, loss: float, feed: Feed) -> None:
        """Raise on all ranks what the ranks' totals show: a loss that is no number, or a loader that failed."""
        if not math.isfinite(loss):
            raise NumericsError(
                f"train: the loss of step {self.step + 1} is {loss}; it must be a finite number. Lower train.lr"
                f" (={self.config.train.lr}), lengthen train.warmup_epochs or set train.clip_norm; checkpoints written"
                " so far are intact."
            )
        if self._totals[2]:
            self.world.agree(feed.error)

    def _update(self) -> StepUpdate:
        """Return how this step moves the parameters."""
        return StepUpdate(
            self.optimizer,
            self.rate.rate(self.step),
            self.step,
            clip_norm=self.config.train.clip_norm,
            whole_tensors=self.program.exchange.owns_whole_tensors,
            sum_over_ranks=self.program.sum_over_ranks,
            timeline=self.timeline,
        )

    # -- between epochs, and after ----------------------------------------------------------------------------------

    @property
    def _epoch(self) -> int:
        """Number of the epoch that the last step belongs to, from 1."""
        return max(0, self.step - 1) // self.parts.steps_per_epoch + 1

    def _ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after so many steps."""
        return step == self.parts.total_steps or step % self.parts.steps_per_epoch == 0

    def _loader(self) -> Loader:
        return Loader(
            self.parts.train_data,
            self.config.data,
            global_batch=self.parts.draw.batch,
            seed=self.config.train.seed,
            part=batch_part(self.program, self.parts.recipe.global_batch),
            first_step=self.step,
            num_steps=self.parts.total_steps - self.step,
            rows=self.parts.draw.rows,
            share=self.parts.draw.share,
        )

    def _end_of_epoch(self, *, save: bool) -> Score | None:
        """Evaluate and save as configured; always after the last step, and save when told to."""
        log, last = self.config.log, self.step == self.parts.total_steps
        score, parts = None, self.parts
        if parts.test_data is not None and (last or _due(self._epoch, log.evaluate_every_epochs)):
            score = evaluate_shares(self.program, parts.groups, parts.test_data, parts.recipe.global_batch)
            shown = {"test_accuracy": score.accuracy, "test_loss": score.loss}
            self._progress.epoch(self._epoch, **shown)
            if self._metrics is not None:
                self._metrics.write("epoch", self.step, epoch=self._epoch, **shown)
        best = score is not None and score.accuracy > self.best_accuracy
        if score is not None and best:
            self.best_accuracy = score.accuracy
        if save or last or best or _due(self._epoch, self.config.checkpoint.every_epochs):
            self.save(best=best, final=last)
        return score

    def save(self, *, best: bool = False, final: bool = False) -> None:
        """Write a checkpoint (collective); an error is raised on all ranks.

        Parameters that are no numbers are not saved: a ReLU may hide them from the loss, and the checkpoints that are
        kept would be pushed out.
        """
        model = self.parts.model
        with self.world.agreeing():
            if not math.isfinite(squared_norm(model.parameters.values)):
                raise NumericsError(
                    f"train: after step {self.step} some parameters are no finite numbers; they are not saved, and"
                    f" checkpoints written so far are intact. Lower train.lr (={self.config.train.lr}) or set"
                    " train.clip_norm."
                )
        for slot in self.optimizer.state.values():
            self.program.exchange.collect(slot)
        tensors = self.whole.tensors(model.parameters.values)
        slots = {slot: self.whole.tensors(flat) for slot, flat in self.optimizer.state.items()}
        statistics = self.whole.statistics()
        with self.world.agreeing():
            if self._store is not None:
                self._store.save(self._snapshot(tensors, slots, statistics), best=best, final=final)

    def _snapshot(
        self, tensors: dict[str, Array], slots: dict[str, dict[str, Array]], statistics: dict[str, Array]
    ) -> checkpoints.Checkpoint:
        return checkpoints.Checkpoint(
            model=self.parts.model.spec.name,
            parameters=tensors,
            statistics=statistics,
            optimizer=slots,
            config=configuration.to_toml(self.config),
            step=self.step,
            epoch=self.step // self.parts.steps_per_epoch,
            best_accuracy=self.best_accuracy,
            lazy_steps=self.program.exchange.round_steps,
            arithmetic=self.parts.arithmetic,
            average=self.rule.state,
            data_fingerprint=self.parts.train_data.fingerprint(),
        )

    def _finish(self, score: Score | None, stopped: str) -> Outcome:
        """Write the last record and return how the run ended (collective)."""
        on_gpu = self.config.device == "cuda"
        mine = peak_memory_bytes(), gpu.peak_memory_bytes() if on_gpu else 0
        summary, peaks = None, self.world.gather_obj(mine)
        if self._metrics is not None and peaks is not None:
            summary = summarise(read(self._metrics.path))
            fields = {} if summary is None else dataclasses.asdict(summary)
            fields["peak_memory_bytes"] = max(host for host, _ in peaks)
            if on_gpu:
                fields["peak_device_memory_bytes"] = max(device for _, device in peaks)
            if score is not None:
                fields |= {"test_accuracy": score.accuracy, "test_loss": score.loss}
            self._metrics.write("end", self.step, epoch=self._epoch, stopped=stopped, **fields)
            self._metrics.close()
        return Outcome(self.folder, self.step, stopped, score, summary)


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0
