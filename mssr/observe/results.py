"""What a finished run says about itself: accuracy before and after, and where to look."""

from pathlib import Path

from mssr.observe.metrics import FILE_NAME, read_metrics


def accuracy_gained(run_dir: Path) -> list[str]:
    """Return one line on the first and the last validation; none without two of them."""
    validations = [line["val/accuracy"] for line in read_metrics(run_dir / FILE_NAME) if "val/accuracy" in line]
    if len(validations) < 2:
        return []
    before, after = validations[0], validations[-1]
    return [f"validation accuracy {before:.1%} before RL, {after:.1%} after ({100 * (after - before):+.1f} points)"]


def places(run_dir: Path) -> list[str]:
    """Return one line for each output that is there: curves, the newest saved rollouts, model."""
    pages = sorted(run_dir.glob("rollouts/step_*/index.html"))
    curves, board = f"`mssr plot {run_dir}` draws {run_dir / 'curves.png'}", run_dir / "tensorboard"
    lines = [f"curves     {board}; {curves}" if board.is_dir() else f"curves     {curves}"]
    if pages:
        lines.append(f"rollouts   {pages[-1]}   (open it in a browser)")
    if (run_dir / "model").is_dir():
        lines.append(f"model      {run_dir / 'model'}")
    return lines
