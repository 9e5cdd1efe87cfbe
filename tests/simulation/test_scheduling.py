"""Which worker handles which message next."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.simulation.scheduling import Job, Move, Schedule


def run_all(
    schedule: Schedule, jobs: list[Job], durations: dict[int, float], *, stateful: bool = False
) -> float:
    """Handle *jobs* on virtual workers, and return the time at which the last one ends."""
    schedule.add(jobs)
    workers = len(schedule._queues)
    ends = [0.0] * workers
    flight: list[list[Job]] = [[] for _ in range(workers)]
    done = 0
    while done < len(jobs):
        for worker in range(workers):
            flight[worker] += schedule.take(worker)
            for move in schedule.take_moves():
                if move.has_state:
                    schedule.arrive(move.client, is_moved=True, origin=move.origin)
        busy = [worker for worker in range(workers) if flight[worker]]
        worker = min(busy, key=lambda one: ends[one] + durations[flight[one][0].client])
        job = flight[worker].pop(0)
        ends[worker] += durations[job.client]
        schedule.finish(job.number, worker, durations[job.client], has_state=stateful)
        done += 1
    return max(ends)


def jobs_of(clients: range, *, start: int = 0, kind: str = "train", call: int = 1) -> list[Job]:
    return [Job(start + client, client, kind, client, call=call) for client in clients]


@pytest.mark.parametrize("stateful", [False, True])
def test_the_second_round_is_balanced_by_measured_durations(stateful: bool) -> None:
    generator = random.Random(1)
    durations = {client: generator.uniform(0.01, 2.0) ** 2 for client in range(40)}
    schedule = Schedule(4)
    ideal = sum(durations.values()) / 4
    run_all(schedule, jobs_of(range(40)), durations, stateful=stateful)
    run_all(schedule, jobs_of(range(40), start=100), durations, stateful=stateful)
    third = run_all(schedule, jobs_of(range(40), start=200), durations, stateful=stateful)
    assert third < 1.15 * max(ideal, *durations.values())


def test_a_client_stays_on_its_worker_while_that_balances() -> None:
    schedule = Schedule(2)
    durations = dict.fromkeys(range(10), 1.0)
    run_all(schedule, jobs_of(range(10)), durations)
    homes = {client: schedule._homes[client] for client in range(10)}
    run_all(schedule, jobs_of(range(10), start=100), durations)
    assert {client: schedule._homes[client] for client in range(10)} == homes


def test_an_idle_worker_takes_messages_of_clients_without_state_only() -> None:
    for has_state in (False, True):
        schedule = Schedule(2)
        schedule.add([Job(1, 1, "train"), Job(2, 2, "train")])
        for worker in (0, 1):
            for job in schedule.take(worker):
                schedule.finish(job.number, worker, 0.5, has_state=has_state)
        home = schedule._homes[1]
        schedule.add([Job(11, 1, "train")])
        other = 1 - home
        schedule._queues[home].in_flight_s = 0.6  # it is busy
        schedule._first_s[1] = 0.01  # its data are loaded again in no time
        taken = schedule.take(other)
        assert [job.client for job in taken] == ([] if has_state else [1])
        moves = schedule.take_moves()
        assert moves == ([] if has_state else [Move(1, home, has_state=False)])


def test_jobs_wait_until_the_state_of_their_client_arrives() -> None:
    schedule = Schedule(2)
    durations = {0: 1.0, 1: 1.0, 2: 0.01, 3: 0.01}
    run_all(schedule, jobs_of(range(4)), durations, stateful=True)
    home = schedule._homes[0]
    schedule._homes[1] = home  # both long ones on one worker
    schedule.add(jobs_of(range(4), start=10))
    taken = {job.client for worker in (0, 1) for job in schedule.take(worker)}
    (move,) = schedule.take_moves()
    assert move.has_state
    assert move.client not in taken
    schedule.arrive(move.client, is_moved=True, origin=move.origin)
    later = [job.client for job in schedule.take(1 - home)]
    assert move.client in {*later, *taken}


def test_a_state_that_cannot_move_stays_where_it_is() -> None:
    schedule = Schedule(2)
    run_all(schedule, jobs_of(range(2)), {0: 1.0, 1: 1.0}, stateful=True)
    home = schedule._homes[0]
    schedule._homes[1] = home
    schedule.add(jobs_of(range(2), start=10))
    (move,) = schedule.take_moves()
    schedule.arrive(move.client, is_moved=False, origin=home)
    assert schedule._homes[move.client] == home
    assert {job.client for job in schedule.take(home)}


def test_in_order_few_replies_wait_for_an_earlier_one() -> None:
    schedule = Schedule(2, in_order=True, max_ahead=4)
    jobs = jobs_of(range(20))
    schedule.add(jobs)
    first = schedule.take(0)[0]
    assert first.position == 0  # and it is slow
    ahead = []
    for _ in range(30):
        for job in schedule.take(1):
            ahead.append(job.position)
            schedule.finish(job.number, 1, 0.001, has_state=False)
    assert max(ahead) < 4


def test_jobs_of_a_dead_worker_are_returned_with_the_clients_that_lose_state() -> None:
    schedule = Schedule(1)
    run_all(schedule, jobs_of(range(3)), dict.fromkeys(range(3), 0.5), stateful=True)
    schedule.add(jobs_of(range(3), start=10))
    taken = schedule.take(0)
    jobs, clients = schedule.lose(0)
    assert jobs == taken
    assert clients == [0, 1, 2]
    schedule.add(jobs, is_first=True)
    handled = []
    while batch := schedule.take(0):
        assert len([job for job in batch if job.is_suspect]) <= 1
        for job in batch:
            handled.append(job.client)
            schedule.finish(job.number, 0, 0.001, has_state=False)
    assert sorted(handled) == [0, 1, 2]


def test_a_suspect_is_alone_also_if_its_worker_is_without_other_work() -> None:
    schedule = Schedule(2)
    schedule._means["train"] = 0.001
    schedule.add(jobs_of(range(1)))
    assert schedule.take(0)
    lost, _ = schedule.lose(0)
    schedule.add(lost, is_first=True)
    schedule._homes.update(dict.fromkeys(range(1, 20), 1))
    schedule.add(jobs_of(range(1, 20)))
    assert [job.client for job in schedule.take(0)] == [0]
    assert schedule.take(0) == []  # it does not take one of the other worker


def test_a_worker_with_work_does_not_take_a_suspect_of_another_one() -> None:
    schedule = Schedule(2)
    schedule._means["train"] = 0.001
    schedule._homes.update({0: 0, **dict.fromkeys(range(1, 20), 1)})
    jobs = jobs_of(range(20))
    for job in jobs[1:]:
        job.is_suspect = True
    schedule.add(jobs)
    assert [job.client for job in schedule.take(0)] == [0]


def test_jobs_of_a_dead_worker_come_before_later_ones_of_their_client() -> None:
    schedule = Schedule(1)
    schedule.add([Job(1, 0, "train")])
    (first,) = schedule.take(0)
    schedule.add([Job(2, 0, "train")])
    lost, _ = schedule.lose(0)
    schedule.add(lost, is_first=True)
    assert schedule.take(0) == [first]


def test_in_order_a_job_of_a_dead_worker_may_be_the_last_one() -> None:
    schedule = Schedule(2, in_order=True)
    schedule.add(jobs_of(range(2)))
    (first,), (second,) = schedule.take(0), schedule.take(1)
    lost, _ = schedule.lose(0)
    schedule.add(lost, is_first=True)
    schedule.finish(second.number, 1, 0.001, has_state=False)
    assert schedule.take(0) == [first]


def test_in_order_a_job_whose_state_arrives_late_blocks_no_worker() -> None:
    schedule = Schedule(2, in_order=True, max_ahead=4)
    run_all(schedule, jobs_of(range(20)), dict.fromkeys(range(20), 0.001), stateful=True)
    schedule._move(0, 1)
    schedule.add(jobs_of(range(20), start=100))
    handled: list[int] = []

    def handle() -> bool:
        for worker in (0, 1):
            for job in schedule.take(worker):
                handled.append(job.client)
                schedule.finish(job.number, worker, 0.001, has_state=True)
        return bool(handled)

    for _ in range(20):
        handle()
    assert 0 not in handled
    schedule.arrive(0, is_moved=True, origin=0)
    for _ in range(40):
        handle()
    assert sorted(handled) == list(range(20))


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 9), st.floats(0.0001, 0.5)), min_size=1, max_size=60),
    st.booleans(),
)
def test_each_job_is_handled_once_and_those_of_a_client_in_order(
    workers: int, work: list[tuple[int, float]], stateful: bool
) -> None:
    schedule = Schedule(workers)
    jobs = [Job(number, client, "train", number) for number, (client, _) in enumerate(work)]
    schedule.add(jobs)
    order: list[int] = []
    while len(order) < len(jobs):
        for worker in range(workers):
            taken = schedule.take(worker)
            for move in schedule.take_moves():
                if move.has_state:
                    schedule.arrive(move.client, is_moved=True, origin=move.origin)
            for job in taken:
                order.append(job.number)
                schedule.finish(job.number, worker, work[job.number][1], has_state=stateful)
    assert sorted(order) == list(range(len(jobs)))
    for client in range(10):
        own = [number for number in order if work[number][0] == client]
        assert own == sorted(own)
