"""Plain NumPy references of the aggregation modes: event simulations that share no code with fedbus.

Each client takes ``train(client, number, w)``, its update of *w* in its *number*-th training, and the durations of its
trainings. The result is the list of the global models, and of the updates of each aggregation as (client, staleness).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Train = Callable[[str, int, Array], Array]
Durations = Mapping[str, Sequence[float]]
Aggregations = list[tuple[Array, list[tuple[str, int]]]]


def inverse_sqrt(staleness: int) -> float:
    return float(1 / np.sqrt(1 + staleness))


def weighted_mean(terms: Sequence[tuple[int, Array]]) -> Array:
    total: Array = np.sum([weight * array for weight, array in terms], axis=0)
    return total / sum(weight for weight, _ in terms)


def fedavg(w: Array, train: Train, examples: Mapping[str, int], rounds: int) -> list[Array]:
    """McMahan et al. 2017: the mean of all clients, weighted by examples."""
    models = []
    for number in range(rounds):
        updates = {client: train(client, number, w) for client in examples}
        w = weighted_mean([(examples[client], updates[client]) for client in examples])
        models.append(w)
    return models


def fedbuff(
    w: Array,
    train: Train,
    examples: Mapping[str, int],
    durations: Durations,
    buffer_size: int,
    aggregations: int,
    server: Callable[[Array, Array], Array] = lambda w, change: w + change,
    weight: Callable[[int], float] = inverse_sqrt,
) -> Aggregations:
    """Nguyen et al. 2022, Algorithm 1, with the mean of the changes weighted by examples.

    All clients train all the time. *server* is the server's optimizer: the next model from the current one and the
    mean change.
    """
    versions, version = [w], 0
    numbers = dict.fromkeys(durations, 0)
    sequence = 0
    heap: list[tuple[float, int, str, int]] = []

    def begin(client: str, now: float) -> None:
        nonlocal sequence
        times = durations[client]
        heapq.heappush(heap, (now + times[min(numbers[client], len(times) - 1)], sequence, client, version))
        sequence += 1

    for client in durations:
        begin(client, 0.0)
    result: Aggregations = []
    while len(result) < aggregations:
        buffer: list[tuple[str, int, Array]] = []
        while len(buffer) < buffer_size:
            now, _, client, started = heapq.heappop(heap)
            update = train(client, numbers[client], versions[started])
            numbers[client] += 1
            staleness = version - started
            buffer.append((client, staleness, weight(staleness) * (update - versions[started])))
            if len(buffer) < buffer_size:
                begin(client, now)
        change = weighted_mean([(examples[client], delta) for client, _, delta in buffer])
        w = server(versions[version], change)
        versions.append(w)
        version += 1
        result.append((w, [(client, staleness) for client, staleness, _ in buffer]))
        begin(client, now)
    return result


def fedasync(
    w: Array,
    train: Train,
    durations: Durations,
    alpha: float,
    aggregations: int,
    weight: Callable[[int], float] = inverse_sqrt,
) -> Aggregations:
    """Xie et al. 2019, Algorithm 1: ``x_t = (1 - α_t) x_{t-1} + α_t x_new`` with ``α_t = α · s(t - τ)``."""
    versions = [w]
    numbers = dict.fromkeys(durations, 0)
    heap = [(times[0], index, client, 0) for index, (client, times) in enumerate(durations.items())]
    heapq.heapify(heap)
    sequence = len(heap)
    result: Aggregations = []
    while len(result) < aggregations:
        now, _, client, started = heapq.heappop(heap)
        update = train(client, numbers[client], versions[started])
        numbers[client] += 1
        staleness = len(versions) - 1 - started
        share = alpha * weight(staleness)
        w = (1 - share) * versions[-1] + share * update
        versions.append(w)
        result.append((w, [(client, staleness)]))
        times = durations[client]
        duration = times[min(numbers[client], len(times) - 1)]
        heapq.heappush(heap, (now + duration, sequence, client, len(versions) - 1))
        sequence += 1
    return result


def deadline(
    w: Array,
    train: Train,
    examples: Mapping[str, int],
    durations: Durations,
    deadline_s: float,
    min_updates: int,
    rounds: int,
    *,
    drops: bool = False,
    weight: Callable[[int], float] = inverse_sqrt,
) -> Aggregations:
    """Rounds that end at a deadline: a late update is merged into the round in which it arrives, or dropped."""
    versions: list[Array] = [w]
    numbers = dict.fromkeys(durations, 0)
    running: list[tuple[float, int, str, int]] = []
    sequence, now = 0, 0.0
    result: Aggregations = []
    for version in range(rounds):
        start = now

        def send(clients: Sequence[str], now: float, version: int = version) -> None:
            nonlocal sequence
            for client in clients:
                times = durations[client]
                arrival = now + times[min(numbers[client], len(times) - 1)]
                heapq.heappush(running, (arrival, sequence, client, version))
                sequence += 1

        busy = {client for _, _, client, _ in running}
        sent = [client for client in durations if client not in busy]
        send(sent, now)
        updates: list[tuple[str, int, Array]] = []
        while True:
            is_awaited = any(started == version for _, _, _, started in running)
            if len(updates) >= min_updates and (now >= start + deadline_s or not is_awaited):
                break
            if not is_awaited:
                again = [one for one in durations if one not in sent and one not in {r[2] for r in running}]
                send(again, now)
                sent += again
                if not running:
                    break
            if len(updates) >= min_updates and running[0][0] > start + deadline_s:
                now = max(now, start + deadline_s)
                break
            arrival, _, client, started = heapq.heappop(running)
            now = max(now, arrival)
            update = train(client, numbers[client], versions[started])
            numbers[client] += 1
            staleness = version - started
            if staleness and drops:
                continue
            contribution = versions[version] + weight(staleness) * (update - versions[started])
            updates.append((client, staleness, update if not staleness else contribution))
        mean = weighted_mean([(examples[client], update) for client, _, update in updates])
        versions.append(mean)
        result.append((mean, [(client, staleness) for client, staleness, _ in updates]))
    return result
