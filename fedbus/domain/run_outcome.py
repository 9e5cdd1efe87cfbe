"""Whether a run that came to its last round has come to anything."""

from fedbus.contracts.situations import ServerTraining


def no_update_reason(run: ServerTraining) -> str:
    """Why there is nothing to make a version of: every training of the run failed. Empty where one did not.

    Flower's strategies go on after a round that nobody's update is in, with the model as it was. An app that
    reports no rounds is believed.
    """
    if not run.trainings or run.failures < run.trainings:
        return ""
    last = run.last.failures if run.last else {}
    reasons = "; ".join(f"{client}: {why}" for client, why in sorted(last.items()))
    failed = f"no client's update is in any of the {run.round} rounds"
    return f"{failed}; in the last one {reasons}" if reasons else failed
