"""Can the random histories fail? Each mistake put into the sequencer has to be found by them, and soon.

And the sequencer as it is, under AddressSanitizer and UndefinedBehaviorSanitizer, with everything in the arena poisoned
that is not its own to touch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hast.ffi import build
from tests.sim import variants
from tests.sim.harness import Library
from tests.sim.history import History
from tests.sim.variants import Mistake


def in_one_of(files: tuple[str, ...], name: str, old: str, new: str) -> Mistake:
    """In the file in which it stands."""
    found = [file for file in files if old in (build.HERE / file).read_text()]
    return Mistake(name, found[0] if found else files[0], old, new)


def in_seq(name: str, old: str, new: str) -> Mistake:
    """In one of those that bios go through."""
    return in_one_of(("seq.c", "seq_slots.c", "seq_mutation.c", "seq_flush.c", "seq_local.c"), name, old, new)


def in_map(name: str, old: str, new: str) -> Mistake:
    return in_one_of(("seq_map.c", "seq_map_update.c"), name, old, new)


MISTAKES = [
    in_seq(
        "clean_after_one_side",
        "seq_map_leave(a, bio, remote_ok && bio->error[HAST_LOCAL] == 0);",
        "seq_map_leave(a, bio, remote_ok || bio->error[HAST_LOCAL] == 0);",
    ),
    in_seq(
        "write_before_the_map",
        "else if (!seq_held(a) && seq_map_durable(a, bio))\n\t\tseq_launch(a, bio);",
        "else if (!seq_held(a))\n\t\tseq_launch(a, bio);",
    ),
    in_seq(
        "answer_before_the_grant",
        "if (verdict == 0 && !s->degraded_ok)",
        "if (verdict == 0 && s->joining)",
    ),
    in_seq(
        "range_free_when_answered",
        "mutation_try_ack(a, bio);\n\tif (bio->pending != 0)\n\t\treturn;",
        "mutation_try_ack(a, bio);\n\tif (bio->pending != 0) {\n"
        "\t\tif (bio->answered)\n\t\t\tseq_unlock(a, bio);\n\t\treturn;\n\t}",
    ),
    in_map("clean_without_flush", "if (e->epoch > s->flushed) {", "if (e->epoch > s->epoch) {"),
    in_map("clean_while_busy", "e->inflight != 0 || e->keep != 0)", "e->keep != 0)"),
    in_seq("flush_covers_later_writes", "s->flush_cover = s->epoch++;", "s->flush_cover = ++s->epoch;"),
    in_seq("trust_a_lost_cache", "\tseq_distrust(a);\n\t/* A joining", "\t/* A joining"),
    in_seq(
        "trust_a_failed_flush",
        "\t\tseq_raise(a, HAST_SEQ_REMOTE_FAILED);\n\tseq_distrust(a);",
        "\t\tseq_raise(a, HAST_SEQ_REMOTE_FAILED);",
    ),
    in_map(
        "join_before_the_map",
        "\t\tif (!s->map_busy) {\n\t\t\tjoin(a);",
        "\t\t{\n\t\t\tjoin(a);",
    ),
    in_map("join_without_the_map", "s->joining && peers_map_kept(a)", "s->joining"),
    in_seq(
        "delete_forgotten_there",
        "\t\tseq_map_suspect_bio(a, bio);\n\t} else if (s->connected) {",
        "\t} else if (s->connected) {",
    ),
    in_seq(
        "read_what_is_older_there",
        "return s->sync_remote || s->turning || s->peer_whole || !seq_sync_marked(a, bio);",
        "return 1;",
    ),
    in_map(
        "rely_on_a_bit_being_cleared",
        "ondisk[bio->offset + i] &= slab[i];",
        "ondisk[bio->offset + i] |= 0;",
    ),
    in_map(
        "failed_update_taken_for_done",
        "\t\tif (error == 0) {\n\t\t\t/* Else",
        "\t\tif (error >= 0) {\n\t\t\t/* Else",
    ),
    in_map("most_recent_pushed_out", "i = keep[0].prev;", "i = keep[0].next;"),
    in_seq(
        "memsync_without_received",
        "(s->mode == HAST_MODE_MEMSYNC && bio->received)",
        "s->mode == HAST_MODE_MEMSYNC",
    ),
    in_seq(
        "async_before_local",
        "bio->state == HAST_BIO_GRANTWAIT || (bio->pending & LOCAL) != 0 ||",
        "bio->state == HAST_BIO_GRANTWAIT ||",
    ),
    in_seq("freed_before_answered", "if (!bio->held && !answer_waits(bio))", "if (!bio->held)"),
    in_seq(
        "waits_for_ever",
        "if (later->blockers > 0 && overlap(bio, later) && --later->blockers == 0)",
        "if (later->blockers > 1 && overlap(bio, later) && --later->blockers == 0)",
    ),
    in_map("copy_not_spoiled", "\t\t\tseq_sync_spoil(a, n);\n", ""),
    Mistake(
        "copying_done_without_flush",
        "seq_sync.c",
        "} else if (s->flushed >= s->sync_flush) {",
        "} else if (s->flushed <= s->sync_flush) {",
    ),
    Mistake(
        "copied_from_a_component_that_has_lost_something",
        "seq_sync.c",
        "return s->sync_remote || !s->no_source;",
        "return s != NULL;",
    ),
    in_seq(
        "hidden_before_it_is_stored",
        "return bio->error[HAST_LOCAL] == 0 || (s->sync_remote && !s->turning && !s->settling);",
        "return 1;",
    ),
    in_seq("hidden_before_it_is_durable_there", "if (bio->durable_epoch > s->flushed_remote)", "if (0)"),
    in_seq(
        "hidden_while_the_secondary_lacks_something",
        "s->no_turn || !(s->peer_whole || s->sync_remote))",
        "s->no_turn)",
    ),
    in_seq(
        "told_before_it_is_durable_there",
        "if (s->turn_epoch <= s->flushed_remote && !(s->turn_detach && s->map_busy)) {",
        "if (!(s->turn_detach && s->map_busy)) {",
    ),
    in_seq("out_of_date_and_alone", "if (s->sync_remote && !remote_ok) {", "if (0) {"),
    in_seq("read_from_a_cache_that_may_go", "s->confirming = 1;", "s->confirming = 0;"),
    in_seq(
        "answered_from_a_cache_that_is_lost",
        ": seq_strict(a) && seq_sync_marked(a, bio))",
        ": 0)",
    ),
    in_seq(
        "blames_a_new_connection",
        "if (component == HAST_REMOTE && bio->error[HAST_REMOTE] != 0 && s->connected)",
        "if (bio->error[HAST_REMOTE] != 0 && s->connected)",
    ),
    in_seq(
        "believes_a_secondary_that_has_failed",
        "if (error == 0 && s->connected && (s->asked & HAST_SEQ_REMOTE_FAILED) != 0)",
        "if (0)",
    ),
    in_seq("flush_without_a_grant", "return s->last_epoch > s->flushed || seq_sync_any(a);", "return 0;"),
]

EVENTS = 300000


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return variants.compile_all(tmp_path_factory.mktemp("objects"))


def found_after(library: Library, events: int) -> int | None:
    """How many events it takes until the mistake is found."""
    spent = 0
    for seed in range(10000):
        history = History(seed, library)
        try:
            history.play(400)
        except Exception:
            return spent + history.steps
        spent += history.steps
        if spent > events:
            return None
    return None


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found(mistake: Mistake, objects: dict[str, Path], tmp_path: Path) -> None:
    library = variants.load(variants.link(tmp_path, objects, mistake))
    found = found_after(library, EVENTS)
    assert found is not None, f"{mistake.name} is not found in {EVENTS} events"


def test_no_mistake_is_found_where_none_is(objects: dict[str, Path], tmp_path: Path) -> None:
    library = variants.load(variants.link(tmp_path, objects))
    assert found_after(library, 10000) is None


# ---- sanitizers ----

OVERRUN = in_map("one_kept_too_many", "s->nkeep < a->geo.keepdirty", "s->nkeep <= a->geo.keepdirty")


def run_sanitized(library: Path, steps: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the sanitizer has to be there before everything else."""
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = dict(
        os.environ,
        LD_PRELOAD=runtime.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:exitcode=99",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    command = [sys.executable, "-m", "tests.sim.run", "--seed", "0", "--events", str(steps)]
    return subprocess.run(
        [*command, "--sanitized", str(library)],
        cwd=variants.build.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def sanitized(tmp_path: Path, mistake: Mistake | None = None) -> Path:
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    if runtime.returncode != 0 or not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("this compiler has no libasan.so")
    return variants.link(tmp_path, variants.compile_all(tmp_path, variants.SANITIZE), mistake, variants.SANITIZE)


def test_sequencer_under_sanitizers(tmp_path: Path) -> None:
    done = run_sanitized(sanitized(tmp_path), 15000)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sanitizers_see_an_overrun_within_the_arena(tmp_path: Path) -> None:
    done = run_sanitized(sanitized(tmp_path, OVERRUN), 15000)
    assert done.returncode == 99 and "use-after-poison" in done.stderr, done.stdout + done.stderr
