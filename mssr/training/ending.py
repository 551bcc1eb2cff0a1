"""The end of a run: its curves; the trained model with its card; the summary."""

from dataclasses import asdict
from dataclasses import replace as changed

from mssr.observe.metrics import FILE_NAME, read_metrics
from mssr.outputs import replace
from mssr.policy.export import Files, save_trained
from mssr.policy.model import Policy
from mssr.training.card import model_card
from mssr.training.run import CURVES, Run
from mssr.training.summary import CARD, SUMMARY, Summary, places, summarise, this_process, write_summary


def finish(run: Run, policy: Policy) -> Summary:
    """Save the trained model and tell what the run reached; return that on every rank. Collective.

    Raises:
        UserError: an output could not be written.
    """
    config, world = run.config, run.world
    drawn = run.draw_curves()
    written = world.on_main(lambda: _summary_and_cards(run, drawn), f"{config.run_dir}: cannot be read")
    summary, cards = written or (None, {})
    save_trained(policy, run.processors, config.run_dir, world, cards)

    def tell() -> Summary:
        own = {name: str(config.run_dir / file) for name, file in (("card", CARD), ("summary", SUMMARY))}
        told = changed(summary, places=run.tracker_places | places(config.run_dir, summary.best_step) | own)
        write_summary(config.run_dir, asdict(told))
        replace(config.run_dir, CARD, lambda partial: partial.write_bytes(cards["model"][CARD]))
        return told

    return world.gather(world.on_main(tell, f"{config.run_dir}: summary and card cannot be written"))[0]


def _summary_and_cards(run: Run, drawn: bool) -> tuple[Summary, dict[str, Files]]:
    """Return the summary, without places, and for each folder of weights the card and its picture."""
    config = run.config
    records = read_metrics(config.run_dir / FILE_NAME)
    summary = changed(summarise(config, records), **this_process(config, run.world.size))
    picture = {CURVES: (config.run_dir / CURVES).read_bytes()} if drawn else {}
    cards = {}
    for name in ("model", "adapter") if config.model.lora else ("model",):
        path, adapter = config.run_dir / name, name == "adapter"
        title = config.run_dir.resolve().name
        card = model_card(config, records, summary, name=title, path=path, adapter=adapter, picture=drawn)
        cards[name] = {CARD: card.encode(), **picture}
    return summary, cards
