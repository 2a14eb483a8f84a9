"""The invariants, layer by layer. Only the plan is believed."""

import sqlite3

from simulation.sim_plan import expected_points

from ddplog.core.records import scan_payload


def rows(world, sql):
    return sqlite3.Connection.execute(world.database, sql).fetchall()


def check_store(world):
    """After every life of the aggregator: the rank log and the writers' cursors agree; keys are unique, in order."""
    if not rows(world, "SELECT 1 FROM sqlite_master WHERE name = 'meta'"):
        return
    meta = dict(rows(world, "SELECT key, value FROM meta"))
    if "rank_log" not in meta:
        return
    from simulation.sim_edges import _ordinal, stored_meta

    from ddplog.store.rank_log import Position

    end = _ordinal(Position(*stored_meta(world.database, "rank_log")["end"]))
    world.check(end <= len(world.rank_log), f"the store says {end} entries, the log has {len(world.rank_log)}")
    by_number = {journal.incarnation: journal for journal in world.plan.journals}
    next_seqs = {}
    for writer_id, _, rank, incarnation, first_seq, count, payload in world.rank_log[:end]:
        world.check(
            first_seq == next_seqs.get(writer_id, 0), f"entry of {first_seq} after {next_seqs.get(writer_id, 0)}"
        )
        next_seqs[writer_id] = first_seq + count
        journal = by_number[incarnation]
        world.check(rank == journal.rank, f"rank {rank} for {journal.rank}")
        world.check(len(scan_payload(payload)) == count, "an entry whose count is wrong")
        frames = b"".join(journal.frames[first_seq : first_seq + count])
        world.check(payload == frames, f"writer {writer_id}: other bytes than were logged from {first_seq}")
    stored = dict(rows(world, "SELECT writer_id, next_seq FROM writers"))
    for writer_id, next_seq in stored.items():
        found = next_seqs.get(writer_id, 0)
        world.check(found == next_seq, f"writer {writer_id}: the cursor is {next_seq}, the log ends at {found}")


def check_end(world):
    """After the drain: everything once, every point as brute force has it."""
    check_store(world)
    plan = world.plan
    writers = {
        row[0]: row[1:] for row in rows(world, "SELECT incarnation, attempt, next_seq, is_reduced, state FROM writers")
    }
    world.check(len(writers) == len(plan.journals), f"{len(writers)} writers of {len(plan.journals)}")
    for journal in plan.journals:
        attempt, next_seq, is_reduced, state = writers[journal.incarnation]
        who = f"writer {journal.number}, rank {journal.rank} of life {journal.life}"
        world.check(next_seq == len(journal.frames), f"{who}: {next_seq} of {len(journal.frames)} records")
        world.check(attempt == journal.life and is_reduced, f"{who} is in attempt {attempt}, reduced {is_reduced}")
        wanted = "finished" if journal.has_finished else "died"
        world.check(state == wanted, f"{who} is {state}, not {wanted}")
    texts = [text for (text,) in rows(world, "SELECT text FROM texts")]
    logged = sorted(text for journal in plan.journals for text in journal.texts)
    world.check(sorted(texts) == logged, f"texts: {set(texts) ^ set(logged)}, {len(texts)} for {len(logged)}")
    world.check(not rows(world, "SELECT 1 FROM events WHERE kind = 'loss'"), "something was declared lost")
    deaths = rows(world, "SELECT rank FROM events WHERE kind = 'death'")
    killed = sum(not journal.has_finished for journal in plan.journals if journal.of is None)
    world.check(len(deaths) == killed, f"{len(deaths)} deaths for {killed} killed")
    _check_points(world)
    if world.is_quiet:
        again = rows(world, "SELECT name, step FROM superseded JOIN keys USING (key_id) WHERE name IN ('a', 'b')")
        world.check(not again, f"nothing was late, and yet points were emitted before they were complete: {again}")
    world.sink.check_end()


def _check_points(world):
    points = {}
    for attempt, key, step, value, n in rows(
        world, "SELECT attempt, name, step, value, n FROM points JOIN keys USING (key_id)"
    ):
        world.check((attempt, key, step) not in points, f"two rows for {key} at {step}")
        points[attempt, key, step] = (value, n)
    expected = expected_points(world.plan)
    world.check(points.keys() == expected.keys(), f"points: {sorted(points.keys() ^ expected.keys())[:5]}")
    for place, (value, n) in expected.items():
        found, count = points[place]
        world.check(count == n, f"{place}: n is {count}, not {n}")
        world.check(abs(found - value) <= 1e-9 * max(1.0, abs(value)), f"{place}: {found} is not {value}")
