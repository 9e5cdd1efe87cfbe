"""The server side: the rounds of a run.

    for each round:   weights ──▶ train on each client ──▶ add the valid updates ──▶ new weights
                      new weights ──▶ evaluate on each client ──▶ mean metrics

A client that fails, or whose update does not fit, is counted as a failure of this client; the round continues
without it. A round without any update keeps the weights. A run fails if no round has an update, and as soon as all
present clients have failed since the last update.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import structlog

from fedbus.contracts.task.aggregation import AggregationMode, StrategyName
from fedbus.learning.aggregation_planner import Merge
from fedbus.learning.functions.compressed_weights import ENCODINGS_KEY, decode_weights
from fedbus.learning.functions.library import DEFAULT_ROUNDS
from fedbus.learning.functions.message_codec import BadContent, Content, decode, encode, to_metrics
from fedbus.learning.functions.signatures import FunctionName
from fedbus.learning.functions.strategies import AggregationStrategy, FedAvg, RobustStrategy, make_strategy
from fedbus.learning.functions.task_module import Config, FunctionFailed, TaskModule
from fedbus.learning.functions.update_sum import SUM_REQUEST, FunctionsPartialSum
from fedbus.learning.functions.updates import (
    MAX_EXAMPLES,
    BadUpdate,
    Update,
    Weights,
    check_same_arrays,
    check_weights,
)
from fedbus.learning.library import (
    ClientReply,
    ErrorCode,
    Messenger,
    ModeUnsupported,
    NoUpdates,
    OnRound,
    OutgoingMessage,
    ServerJob,
    TrainingFailed,
)
from fedbus.learning.mode_driver import ModeDriver, TakenUpdate, TrackedMessage
from fedbus.learning.payload import Payload
from fedbus.learning.round_log import RoundLog, describe_failures
from fedbus.learning.stale_updates import UpdateRefused, merge_update
from fedbus.learning.weights import ArchitectureMismatch, Arrays, first_difference

LOST_CODES: Final = {ErrorCode.NO_REPLY, ErrorCode.CLIENT_LOST, ErrorCode.MESSAGE_UNAVAILABLE}
"""Errors of the connection, which may be gone in the next round."""

log = structlog.get_logger("fedbus.learning")


class MetricsMean:
    """The mean of metrics, weighted by examples. A metric that some clients lack is the mean of the others."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._examples: dict[str, int] = {}

    def add(self, metrics: dict[str, float], num_examples: int) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * num_examples
            self._examples[name] = self._examples.get(name, 0) + num_examples

    def mean(self) -> dict[str, float]:
        return {name: self._sums[name] / count for name, count in self._examples.items() if count}


class TaskAggregation(RobustStrategy):
    """The task's own function ``aggregate``. It gets all updates of a round."""

    def __init__(self, module: TaskModule, config: Callable[[], Config], *, is_fixed: bool) -> None:
        super().__init__()
        self._module = module
        self._config = config
        self._is_fixed = is_fixed
        self._state: dict[str, Any] = {}

    def end_round(self) -> Weights | None:
        """Return what the function returns, in its own dtypes. Raises FunctionFailed."""
        result = self._aggregate()  # the task's code may keep its arrays, and change them in the next round
        return None if result is None else {name: np.array(array) for name, array in result.items()}

    def _combine(self, updates: list[Update]) -> Weights:
        weights = self._module.aggregate(self.weights, updates, self._config(), self._state)
        if self._is_fixed and self.weights:
            try:
                check_same_arrays(weights, self.weights)
            except BadUpdate as error:
                reason = (
                    f'{error}. The task declares architecture = "fixed" in [tool.fedbus]; '
                    'use "free" for arrays that may change'
                )
                raise self._module.fail(FunctionName.AGGREGATE, reason) from None
        return weights


class FunctionsServer:
    """The server side of one run. Raises BadTask, ModeUnsupported if the run's aggregation does not fit."""

    def __init__(self, job: ServerJob, module: TaskModule) -> None:
        self._job = job
        self._module = module
        self._table = job.aggregation
        self._driver: ModeDriver[Weights] | None = None
        """The exchanges of an aggregation mode other than ``sync``."""
        self._sums_updates = False
        """Whether the updates of this round are added up where the clients are."""
        self._round = 0
        self._failures: dict[str, str] = {}
        """The clients whose code has failed since the last update, with the reasons."""
        self._weights: Weights = {}
        self._expected: Weights = {}
        """Weights with the names and shapes that the updates of this round must have."""
        self._has_own_aggregation = module.has(FunctionName.AGGREGATE)
        self._strategy: AggregationStrategy = (
            TaskAggregation(module, self._make_config, is_fixed=job.task.table.architecture == "fixed")
            if self._has_own_aggregation
            else make_strategy(self._table)
        )
        self._check_mode()

    def run(self, messenger: Messenger, on_round: OnRound) -> Arrays | None:
        """Train the remaining rounds, and return the final weights; None if there are none.

        Raises:
            TrainingFailed: a function of the server failed.
            NoUpdates: no client could train.
            ArchitectureMismatch: the stored weights are not those of ``initial``.

        """
        job = self._job
        self._driver = (
            None if self._table.mode is AggregationMode.SYNC else ModeDriver(messenger, self._table)
        )
        self._check_architecture()
        self._set_weights(job.model)
        round_log = RoundLog(
            job.model,
            run=job.run,
            first_round=job.first_round,
            tally=messenger.tally,
            on_round=on_round,
            now=messenger.now,
        )
        try:
            if job.first_round == 1 and self._module.has(FunctionName.EVALUATE_GLOBAL):
                self._evaluate_global(round_log)
                round_log.end_round(0)
            for number in range(job.first_round, (job.plan.total_rounds or DEFAULT_ROUNDS) + 1):
                self._round = number
                round_log.trace.begin_round(number)
                self._train(messenger, round_log)
                self._evaluate(messenger, round_log)
                self._evaluate_global(round_log)
                round_log.end_round(number)
            round_log.check_updates()
        except FunctionFailed as error:
            raise TrainingFailed(str(error)) from error
        return self._weights or None

    def close(self) -> None:
        """Do nothing: the session holds only memory."""

    # --- a round ------------------------------------------------------------------------------

    def _train(self, messenger: Messenger, round_log: RoundLog) -> None:
        clients = self._sample(messenger, self._table.fraction_train)
        selected = self._job.selection.choose(clients)
        self._strategy.begin_round(self._weights)
        self._expected = self._weights
        metrics = MetricsMean()
        failures: dict[str, str] = {}
        has_update = False
        self._sums_updates = self._can_sum(messenger)
        with round_log.trace.aggregate_span(self._round):
            for reply, update in self._train_clients(messenger, sorted(selected), failures):
                messenger.accept(reply, samples=update.num_examples)
                metrics.add(update.metrics, update.num_examples)
                if update.num_examples and not self._sums_updates:
                    self._expected = self._expected or update.weights
                    self._strategy.add(update)
                has_update = True
            new_weights = self._strategy.end_round()
        if self._driver is not None:
            round_log.set_aggregation(self._driver.report)
        self._failures = {} if has_update else {**self._failures, **failures}
        self._check_failures(messenger.clients())
        if new_weights is None:
            log.warning("Round without updates; keeping the weights", round=self._round)
        else:
            self._set_weights(new_weights)
            round_log.set_model(self._weights)
        round_log.add_metrics(metrics.mean(), prefix="train_")

    def _can_sum(self, messenger: Messenger) -> bool:
        """Return whether the updates of a round can be added up where the clients are.

        The clients compare them with the global weights, so there must be some.
        """
        return (
            messenger.adds_updates
            and self._driver is None
            and isinstance(self._strategy, FedAvg)
            and bool(self._weights)
            and self._job.selection.weights is None
        )

    def _add_sum(self, partial_sum: FunctionsPartialSum) -> None:
        assert isinstance(self._strategy, FedAvg)
        self._strategy.add_sums(partial_sum.sums, partial_sum.weight, partial_sum.dtypes)

    def _evaluate(self, messenger: Messenger, round_log: RoundLog) -> None:
        if not self._table.fraction_evaluate:
            return
        metrics = MetricsMean()
        present = self._sample(messenger, self._table.fraction_evaluate)
        clients = sorted(self._job.selection.choose_for_evaluation(present))
        for reply, update in self._exchange(messenger, "evaluate", clients, {}):
            messenger.accept(reply)
            metrics.add(update.metrics, update.num_examples)
        round_log.add_metrics(metrics.mean(), prefix="eval_")

    def _evaluate_global(self, round_log: RoundLog) -> None:
        if self._module.has(FunctionName.EVALUATE_GLOBAL) and self._weights:
            round_log.add_metrics(self._module.evaluate_global(self._weights, self._make_config()))

    def _sample(self, messenger: Messenger, fraction: float) -> list[str]:
        """Choose this share of the present clients. Raises NotEnoughClients.

        The choice is the same for the same seed and round, or without a seed for the same run and round.
        """
        minimum = self._table.min_clients
        present = sorted(messenger.wait_for_clients(minimum))
        count = min(len(present), max(minimum, int(fraction * len(present))))
        seed = self._job.run if self._job.plan.seed is None else self._job.plan.seed
        generator = random.Random(f"{seed}:{self._round}")  # noqa: S311 - no secret
        return sorted(generator.sample(present, count))

    # --- messages -----------------------------------------------------------------------------

    def _train_clients(
        self, messenger: Messenger, clients: list[str], failures: dict[str, str]
    ) -> Iterator[tuple[ClientReply, Update]]:
        """Train on *clients*, and yield each valid reply as `_exchange` does. The aggregation mode decides when."""
        if self._driver is None:
            yield from self._exchange(messenger, "train", clients, failures)
            return
        payload, weights = self._pack(), self._weights
        cohort = {
            client: partial(
                lambda client: TrackedMessage(self._make_message(client, "train", payload), weights), client
            )
            for client in clients
        }
        for outcome in self._driver.train(self._round, cohort, self._read_merged):
            if isinstance(outcome, TakenUpdate):
                yield outcome.reply, outcome.update
            else:
                _add_failure(failures, outcome.reply)

    def _read_merged(self, reply: ClientReply, start: Weights, merge: Merge) -> Update:
        """Read an untrusted reply of a client that began with *start*, as an update of the current weights.

        Raises:
            UpdateRefused: it is invalid.

        """
        try:
            update = self._read(reply.client, reply.data or b"", "train", start)
        except (BadContent, BadUpdate) as error:
            raise UpdateRefused(str(error)) from None
        return replace(update, weights=merge_update(update.weights, start, self._weights, merge))

    def _exchange(
        self, messenger: Messenger, kind: str, clients: Iterable[str], failures: dict[str, str]
    ) -> Iterator[tuple[ClientReply, Update]]:
        """Send the weights to *clients*, and yield each valid reply.

        The reasons of the others are added to *failures*, by client, unless the client or its reply is lost.
        """
        sent, payload = self._weights, self._pack()
        messages = [self._make_message(client, kind, payload) for client in clients]
        for reply in self._send(messenger, messages):
            if reply.sum is not None:
                self._add_sum(FunctionsPartialSum.unpack(reply.sum))
            if reply.error is not None:
                _add_failure(failures, reply)
                continue
            try:
                update = self._read(reply.client, reply.data or b"", kind, sent)
            except (BadContent, BadUpdate) as error:
                messenger.reject(reply, str(error))
                failures[reply.client] = str(error)
            else:
                yield reply, update

    def _pack(self) -> Payload:
        return Payload.pack(encode(Content({"config": self._values()}, self._weights)))

    def _make_message(self, client: str, kind: str, payload: Payload) -> OutgoingMessage:
        request = SUM_REQUEST if kind == "train" and self._sums_updates else None
        return OutgoingMessage(client=client, kind=kind, payload=payload, round=self._round, sum=request)

    def _send(self, messenger: Messenger, messages: list[OutgoingMessage]) -> Iterator[ClientReply]:
        """Send *messages*, and yield the replies. In an aggregation mode, clients that train get none."""
        if self._driver is None:
            yield from messenger.send(messages)
        else:
            replies = self._driver.exchange([TrackedMessage(message, self._weights) for message in messages])
            yield from (reply for reply, _ in replies)

    def _read(self, client: str, data: bytes | memoryview, kind: str, sent: Weights) -> Update:
        """Read an untrusted reply to a message with the weights *sent*. Raises BadContent, BadUpdate."""
        content = decode(data)
        num_examples = content.values.get("num-examples")
        if (
            not isinstance(num_examples, int)
            or isinstance(num_examples, bool)
            or not 0 <= num_examples <= MAX_EXAMPLES
        ):
            raise BadContent(f"num_examples of the reply is {num_examples!r}")
        weights = check_weights(decode_weights(content.weights, content.values.get(ENCODINGS_KEY), sent))
        if kind == "train" and not (self._has_own_aggregation or self._sums_updates):
            check_same_arrays(weights, self._expected or weights)
        return Update(
            client,
            weights,
            num_examples,
            to_metrics(content.values.get("metrics")),
            weight=num_examples * self._job.selection.weight_factor(client),
        )

    def _check_failures(self, present: list[str]) -> None:
        """End the run if each client that is *present* has failed since the last update, because of its code.

        Raises:
            NoUpdates: no client that was chosen could train, and there is no other client.

        """
        if self._failures and self._failures.keys() >= set(present):
            raise NoUpdates(
                f"no client could train in round {self._round}: {describe_failures(self._failures)}"
            )

    # --- state --------------------------------------------------------------------------------

    def _check_mode(self) -> None:
        """Check that the mode works with the strategy. Raises ModeUnsupported."""
        table = self._table
        if table.merges_late and table.strategy is StrategyName.KRUM and not self._has_own_aggregation:
            raise ModeUnsupported(
                f"the aggregation mode {table.mode} does not work with the strategy krum: it compares the updates of a "
                'whole cohort, and takes an update of older weights for a malicious one. Use mode = "sync", or '
                '"deadline" with late = "drop", or the strategy fedmedian or trimmed-mean'
            )

    def _values(self) -> Config:
        """Return the values that fedbus adds to the configuration of the clients."""
        values: Config = {"server-round": self._round}
        if self._table.strategy is StrategyName.FEDPROX and not self._has_own_aggregation:
            values["proximal-mu"] = self._table.proximal_mu
        return values

    def _make_config(self) -> Config:
        return {**self._job.config, **self._values()}

    def _set_weights(self, weights: Weights) -> None:
        """Set the global weights. They are stored while the next round runs, so nothing may write to them."""
        self._weights = {}
        for name, array in weights.items():
            frozen = array.view()
            frozen.flags.writeable = False
            self._weights[name] = frozen

    def _check_architecture(self) -> None:
        """Check that the stored weights are those that ``initial`` makes, unless the task aggregates itself."""
        if not self._job.model or self._has_own_aggregation or not self._module.has(FunctionName.INITIAL):
            return
        try:
            expected = self._module.initial(self._make_config())
        except FunctionFailed as error:
            raise TrainingFailed(str(error)) from error
        if difference := first_difference(expected, self._job.model):
            raise ArchitectureMismatch(
                f"the stored weights are not those that `initial` makes: {difference}. "
                "Start a new lineage for the new architecture, or return to the code that made the weights"
            )


def _add_failure(failures: dict[str, str], reply: ClientReply) -> None:
    """Add the reason of *reply*, an error, to *failures*, unless the client or its reply is lost."""
    if reply.error is not None and reply.error.code not in LOST_CODES:
        failures[reply.client] = reply.error.reason
