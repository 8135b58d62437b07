"""The training loop: one step, its bookkeeping, and what happens between epochs.

Life of a step: batch -> program (forward, backward, gradients handed over) -> exchange -> update -> one small message
in which the ranks add up loss and answers and agree whether anyone failed or was asked to stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import numpy as np

from hpcnn import gpu
from hpcnn.comm.engine import URGENT
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.errors import HpcnnError, NumericsError
from hpcnn.timeline import Timeline
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import learning_rate, optimizers, reproducible
from hpcnn.train.evaluate import Score, evaluate_shares
from hpcnn.train.feed import Feed, make_loader
from hpcnn.train.folder import open_folder
from hpcnn.train.guard import Guard
from hpcnn.train.kept import Keeper
from hpcnn.train.metrics import MetricsWriter, costs, peak_memory
from hpcnn.train.observer import Observer
from hpcnn.train.outcome import Outcome
from hpcnn.train.progress import Progress
from hpcnn.train.rollback import Rollbacks
from hpcnn.train.rules import Record, make_rule
from hpcnn.train.saver import Saver
from hpcnn.train.setup import Parts
from hpcnn.train.signals import EXIT_STOPPED, StopRequest
from hpcnn.train.state import Counters, State
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
        self.lr_scale = 1.0
        self._saver: Saver | None = None
        self.keeper: Keeper | None = None
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
        self.state = State(parts, self.optimizer)
        self._guard = Guard(self.config, self.program, self.world)
        self._rollbacks = Rollbacks(self.config.train)
        # Of a step: correct answers, requests to stop, who cannot go on, what features add to the loss, and the loss in
        # parts.
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
                store = open_folder(self.folder, self.config, self.program.plan, resume=resume)
                self._saver = Saver(store, self.config.checkpoint, self._progress.message)
        if resume:
            self._load(kept=kept)
        if init is not None and self.step == 0:
            self._load(init)
        with self.world.agreeing():
            if self._saver is not None:
                self._metrics = MetricsWriter(
                    self.folder,
                    resumed_step=self.step if resume else None,
                    tensorboard=self.config.log.tensorboard,
                    on_error=self._saver.note,
                )
        for observer in self.observers:
            observer.begin(self.folder, self.step)
        if self.config.fault.on_rank_failure == "continue":
            self.keeper = Keeper(self.parts, self.optimizer.state)
            self.keeper.keep(self.step, self.best_accuracy, self.lr_scale)

    def say(self, words: str) -> None:
        """Show a line among the progress."""
        self._progress.message(words)

    def _load(self, init: Path | None = None, kept: checkpoints.Checkpoint | None = None) -> bool:
        """Load the newest checkpoint of the run, or parameters from `init`; return if there is one (collective)."""
        with self.world.agreeing():
            loaded = kept
            if self.writes and init is not None:
                loaded = checkpoints.load(init, parameters_only=True)
            elif self.writes and kept is None:
                found = reproducible.to_resume(self.folder, self.parts.train_data.fingerprint(), self.parts.arithmetic)
                if found is not None:
                    loaded = found.checkpoint
                    if found.warning:
                        self._progress.message(f"hpcnn: warning: {found.warning} Going on from {loaded.path}.")
        counters = self.state.restore(loaded, parameters_only=init is not None)
        if counters is not None and init is None:
            self.step, self.best_accuracy, self.lr_scale, average = counters
            self.rule.restore(average)
        return counters is not None

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, request: StopRequest | None = None) -> Outcome:
        """Run all steps that are left (collective).

        Parameters
        ----------
        request : StopRequest, optional
            Already listening; left out, signals are listened to from here on.

        Raises
        ------
        NumericsError
            On every rank, when loss, gradient or parameters are no longer finite, or copies of parameters differ, and
            that ends the run; checkpoints on disk stay as they are.
        CheckpointError
            On every rank, when a checkpoint cannot be written.
        DataError
            On every rank, when any rank cannot read its samples, or records cannot be written.
        """
        with self._progress, StopRequest() if request is None else nullcontext(request) as listening:
            try:
                while True:
                    try:
                        score, stopped = self._run(listening)
                        break
                    except NumericsError as error:
                        self._roll_back(error)
            finally:
                if self._saver is not None:
                    self._saver.settle()
        return self._finish(score, stopped)

    def _run(self, request: StopRequest) -> tuple[Score | None, str]:
        """Make the steps that are left; return the last score, and why the run stops early, if it does."""
        total, every = self.parts.total_steps, self.config.checkpoint.every_steps
        score, stopped = None, ""
        self._progress.start(total, initial=self.step)
        with make_loader(self.parts, self.step) as loader:
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
                if self._guard.due(self.step):
                    self.program.exchange.settle()
                    self._guard.compare(self.step)
                if save or ends_epoch or keep:
                    self.program.exchange.settle()
                    self.program.average_statistics()
                if save or ends_epoch:
                    for observer in self.observers:
                        observer.settle()
                    with self.rule.averaged() as record:
                        self._note_average(record)
                        # Who is asked to stop has little time: no evaluation then, but behind the last step.
                        if ends_epoch and not (stopped and self.step < total):
                            score = self._end_of_epoch(save=save) or score
                        else:
                            self.save(wait=bool(stopped))
                if keep and self.keeper is not None:
                    self.keeper.keep(self.step, self.best_accuracy, self.lr_scale)
        return score, stopped

    def _roll_back(self, error: NumericsError) -> None:
        """Go back to the newest checkpoint because of an error that all ranks have met, or raise it (collective)."""
        factor, from_step, scale = self._rollbacks.factor(error), self.step, self.lr_scale
        self._sum_totals.wait()
        self.program.exchange.abandon()
        if self._saver is not None:
            self._saver.settle()
        if not self._load():
            raise type(error)(f"{error} There is no checkpoint yet to go back to.")
        self.lr_scale = scale * factor
        with self.world.agreeing():
            if self._metrics is not None:
                self._metrics.rewind(self.step)
                fields = {"reason": str(error), "from_step": from_step, "lr_scale": self.lr_scale}
                self._metrics.write("rollback", self.step, epoch=self._epoch, **fields)
                self._progress.message(f"hpcnn: warning: {error} Going back to step {self.step}.")
        for observer in self.observers:
            observer.begin(self.folder, self.step)

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
            trouble = self._trouble(feed) is not None
            totals[:4] = num_correct, request.requested, trouble, term.value if term else 0.0
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
            self._metrics.write("step", self.step, epoch=self._epoch, **shown, **costs(step_s, spent, wait_s))
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
        """Raise on all ranks what the ranks' totals show: a loss that is no number, or something that failed."""
        self._guard.check_loss(loss, self.step + 1)
        if self._totals[2]:
            self.world.agree(self._trouble(feed))

    def _trouble(self, feed: Feed) -> HpcnnError | None:
        """Return what this rank cannot go on with: images that it cannot read, or files that it cannot write."""
        return feed.error or (self._saver.error if self._saver is not None else None)

    def _update(self) -> StepUpdate:
        """Return how this step moves the parameters."""
        return StepUpdate(
            self.optimizer,
            self.rate.rate(self.step) * self.lr_scale,
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

    def _end_of_epoch(self, *, save: bool) -> Score | None:
        """Evaluate and save as configured, and save when told to."""
        log, last = self.config.log, self.config.checkpoint.final and self.step == self.parts.total_steps
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

    def save(self, *, best: bool = False, final: bool = False, wait: bool = False) -> None:
        """Begin to write a checkpoint, or write it (collective); an error is raised on all ranks.

        Damaged parameters are not saved: a ReLU may hide them from the loss, and the checkpoints that are kept would be
        pushed out.
        """
        self._guard.check(self.step)
        snapshot = self.state.gather(Counters(self.step, self.best_accuracy, self.lr_scale, self.rule.state))
        with self.world.agreeing():
            if self._saver is not None:
                self._saver.save(snapshot, best=best, final=final, wait=wait)

    def _finish(self, score: Score | None, stopped: str) -> Outcome:
        """Write the last record and return how the run ended (collective)."""
        peaks = self.world.gather_obj(peak_memory(self.config.device))
        summary = None
        if self._metrics is not None and peaks is not None:
            summary = self._metrics.finish(self.step, peaks, score, epoch=self._epoch, stopped=stopped)
        with self.world.agreeing():
            if self._saver is not None and self._saver.error is not None:
                raise self._saver.error
        return Outcome(self.folder, self.step, stopped, score, summary)


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0
