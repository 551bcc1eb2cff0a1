import io
from contextlib import ExitStack

from rich.console import Console

from mssr.observe.progress import SFT_COLUMNS, Activity, TrainProgress

VALUES = {
    "train/reward": 0.61,
    "policy/entropy": 0.12,
    "policy/clip_fraction": 0.01,
    "rollout/logp_gap_mean": 1.2e-6,
    "perf/tokens_per_second": 5200.4,
    "perf/step_seconds": 1.3,
    "train/grad_norm": 7.0,  # not shown
}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def show(console, clock, total=200, **options):
    return TrainProgress("demo", total, console=console, clock=clock, **options)


def log_console():
    return Console(file=io.StringIO(), width=40)  # not a terminal; narrower than a line, which must not wrap


def terminal():
    return Console(file=io.StringIO(), width=90, force_terminal=True)


def test_a_log_gets_one_whole_line_with_every_column():
    console, clock = log_console(), Clock()
    with show(console, clock, start_step=39) as progress:
        clock.now += 2
        progress.update(40, VALUES | {"val/accuracy": 0.58})
    assert console.file.getvalue() == (
        "step  40/200  reward 0.61  val 0.58 (best 0.58)  entropy 0.120  clip 0.010  gap 1.2e-06  "
        "5200 tok/s  1.3 s/step  left 0:05:20\n"
    )


def test_a_metric_not_seen_yet_shows_as_a_dash_and_an_old_one_stays():
    console, clock = log_console(), Clock()
    with show(console, clock) as progress:
        progress.update(1, {"train/reward": 0.5})
        clock.now += 10
        progress.update(2, {"val/accuracy": 0.7})
        clock.now += 10
        progress.update(3, {"val/accuracy": 0.6})
    first, second, third = console.file.getvalue().splitlines()
    assert "reward 0.50  val -  entropy -  clip -  gap -  - tok/s  - s/step" in first
    assert "reward 0.50  val 0.70 (best 0.70)" in second
    assert "reward 0.50  val 0.60 (best 0.70)" in third


def test_lines_come_every_five_seconds_at_validations_and_at_the_end():
    console, clock = log_console(), Clock()
    with show(console, clock, total=20) as progress:
        for step in range(1, 21):
            clock.now += 1
            progress.update(step, VALUES | ({"val/accuracy": 0.5} if step == 8 else {}))
    steps = [int(line.split()[1].split("/")[0]) for line in console.file.getvalue().splitlines()]
    assert steps == [1, 6, 8, 13, 18, 20]


def test_time_left_counts_this_session_only_and_follows_the_recent_pace():
    console, clock = log_console(), Clock()
    with show(console, clock, total=1000, start_step=500) as progress:
        for step in range(501, 601):
            clock.now += 100 if step <= 540 else 36  # slow at first (compiling): forgotten after fifty steps
            progress.update(step, {})
    assert console.file.getvalue().splitlines()[-1].endswith("left 4:00:00")
    assert console.file.getvalue().splitlines()[0].endswith("left 13:51:40")


def test_notes_are_printed_as_they_are():
    console = log_console()
    with show(console, Clock()) as progress:
        progress.note("skipped [red]row[/red] 7: " + "x" * 60)
    assert console.file.getvalue() == "skipped [red]row[/red] 7: " + "x" * 60 + "\n"


def test_a_disabled_display_says_nothing():
    console = terminal()
    with show(console, Clock(), enabled=False) as progress:
        progress.note("hello")
        progress.update(200, VALUES)
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_panel_with_trends_and_the_best_validation():
    console, clock = terminal(), Clock()
    with show(console, clock, total=4) as progress:
        progress.note("loading")
        for step, accuracy in enumerate((0.2, 0.9, 0.5), start=1):
            clock.now += 30
            progress.update(step, VALUES | {"train/reward": step / 4, "val/accuracy": accuracy})
    shown = console.file.getvalue()
    last = shown[shown.rindex("╭") :]
    for part in ("demo", "/4", "0:01:30 gone", "0:00:30 left", "▁▅█", "▁█▄", "best 0.90", "0.50", "1.2e-06", "5200"):
        assert part in last, part
    assert "loading" in shown


def test_supervised_training_has_its_own_columns():
    console, clock = log_console(), Clock()
    with show(console, clock, columns=SFT_COLUMNS) as progress:
        progress.update(1, {"sft/loss": 1.25, "train/reward": 0.5})
    assert console.file.getvalue() == "step   1/200  loss 1.250  val -  - tok/s  - s/step  left 0:00:00\n"


def test_nan_is_shown_and_breaks_nothing():
    console, clock = terminal(), Clock()
    with show(console, clock) as progress:
        for step, reward in enumerate((0.1, float("nan"), 0.2), start=1):
            progress.update(step, {"train/reward": reward, "val/accuracy": reward})
    assert "▁ █" in console.file.getvalue() and "best 0.20" in console.file.getvalue()


def test_a_forced_colour_pipe_is_not_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TrainProgress("demo", 2) as progress:
        progress.update(1, VALUES)
    assert capsys.readouterr().out.startswith("step 1/2  reward 0.61")


def test_a_log_says_what_runs_and_every_five_seconds_how_far_it_is():
    console, clock = log_console(), Clock()
    activity = Activity(console=console, clock=clock)
    activity.say("loading [red]here[/red]")
    with activity("validation") as advance:
        for _ in range(6):
            clock.now += 2
            advance(100, 512)
    assert console.file.getvalue().splitlines() == [
        "mssr: loading [red]here[/red]",
        "mssr: validation",
        "mssr: validation: 300/512, 0:00:04 left",
        "mssr: validation: 512/512, 0:00:00 left",
    ]


def test_a_terminal_shows_a_bar_only_while_it_counts():
    console = terminal()
    with Activity(console=console)("validation") as advance:
        assert console.file.getvalue().splitlines() == ["mssr: validation"]  # what starts up may write now
        advance(200, 512)
        advance(400, 512)  # ranks may have more together, where the last ones have a row less
    shown = console.file.getvalue()
    assert "200/512" in shown and "512/512" in shown and "?" not in shown.replace("[?25", "")
    assert shown.endswith("\x1b[2K")  # the bar is gone


def test_between_steps_an_activity_is_in_the_panel_until_it_ends():
    """The last frame is drawn when the display ends."""
    last_frames = []
    for ended in (False, True):
        console, clock = terminal(), Clock()
        activity, progress = Activity(console=console, clock=clock), show(console, clock)
        with activity.within(progress), ExitStack() as validation, progress:
            validation.enter_context(activity("validation"))(3, 512)
            if ended:
                validation.close()
        shown = console.file.getvalue()
        last_frames.append(shown[shown.rindex("╭") :])
        assert "mssr:" not in shown
    assert "validation 3/512" in last_frames[0] and "validation" not in last_frames[1]


def test_between_steps_a_log_says_only_what_takes_long():
    console, clock = log_console(), Clock()
    activity = Activity(console=console, clock=clock)
    with show(console, clock) as progress, activity.within(progress):
        for seconds in (1, 6):
            with activity("validation") as advance:
                clock.now += seconds
                advance(256, 512)
    activity.say("saving")
    assert console.file.getvalue().splitlines() == ["mssr: validation: 256/512, 0:00:06 left", "mssr: saving"]


def test_other_ranks_say_nothing():
    for console in (terminal(), log_console()):
        activity = Activity(enabled=False, console=console)
        activity.say("loading")
        with activity("validation") as advance:
            advance(1, 2)
        assert console.file.getvalue() == ""
