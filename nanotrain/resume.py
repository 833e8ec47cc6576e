"""What a run goes on from: its newest checkpoint, or the weights of another run. And whether that fits what is here."""

from nanotrain import checkpoint, config, recipe
from nanotrain.errors import CheckpointError, DataError, UserError


def load_checkpoint(dist, run_dir, run_name, resume):
    """(state, model tensors, optimizer tensors) of a run's newest checkpoint that verifies, or three Nones for a new
    run. Raises UserError if there is a checkpoint and `resume` is False.
    """
    verified = {}

    def find():
        if resume:
            step, verified["files"], complaints = checkpoint.newest(run_dir)
            return step, complaints
        if checkpoint.steps(run_dir):
            step = checkpoint.steps(run_dir)[0]
            raise UserError(
                f"run {run_name!r} is already at step {step}: go on with --resume, or choose another --run-name"
            )
        return None, []

    step, complaints = dist.on_rank0(find)
    for complaint in complaints:
        dist.print0(f"not used: {complaint}")
    if step is None:
        return None, None, None
    model_tensors, optimizer_tensors, state = dist.on_all_ranks(
        lambda: checkpoint.unpack(verified.pop("files", None) or checkpoint.read(run_dir, step))
    )
    return state, model_tensors, optimizer_tensors


def check_same(state, tokenizer, data, settings, identity, trajectory, allowed):
    """Raise an error with a readable difference if a checkpoint was trained with something else than what is here.

    settings: {name: value}. identity, trajectory: the names of those that cannot change within a run, and of those that
    can if `allowed`, names with commas between, has them. Those of neither may change.
    """
    if state["tokenizer_sha256"] != tokenizer.sha256():
        raise DataError(
            "the tokenizer is not the one this run was trained with: give --tokenizer-dir (the run's folder has "
            "a copy), or start another run with --run-name"
        )
    if state["data"] != data:
        raise DataError(
            "the data are not those this run was trained with: give their folder with --data-dir, or start another run "
            "with --run-name"
        )
    allowed = {name.strip().replace("-", "_").upper() for name in allowed.split(",")}
    lines = []
    for name in (*identity, *trajectory):
        if changed(state, settings, name) and (name in identity or name not in allowed):
            what = f"{config.flag_of(name)} was {state['settings'][name]}, is {settings[name]}"
            allow = f"allow it with --allow-change={name.lower()}"
            lines.append(f"{what}: {'it cannot change within a run' if name in identity else allow}")
    if lines:
        raise UserError("this run was started with other settings:\n  " + "\n  ".join(lines))


def changed(state, settings, name):
    """Whether a setting is another than in the checkpoint, which does not know those that are newer than it."""
    if name not in state["settings"]:
        return False
    was = state["settings"][name]
    return (recipe.schedule_name(was) if name == "SCHEDULE" else was) != settings[name]


def load_first_weights(dist, source, model_config, tokenizer):
    """{name: tensor} of the newest checkpoint of the run `source`, for a new run to begin with. Raises CheckpointError,
    DataError or UserError if there is none, or if tokenizer or shape are others.
    """
    run_dir = dist.on_rank0(lambda: checkpoint.find_run(source))

    def load():
        step, files, _ = checkpoint.newest(run_dir)
        if step is None:
            raise CheckpointError(f"--init-from={source}: no checkpoint in {run_dir}")
        tensors, _, state = checkpoint.unpack(files)
        if state["tokenizer_sha256"] != tokenizer.sha256():
            raise DataError(f"--init-from={source} has another tokenizer: give its own, --tokenizer-dir={run_dir}")
        own = model_config.to_dict()
        other = {name: value for name, value in state["model_config"].items() if own[name] != value}
        if other:
            shape = ", ".join(f"{name} {value}" for name, value in other.items())
            raise UserError(f"--init-from={source} has another shape: {shape}; use the settings it was trained with")
        dist.print0(f"weights    of {source} at step {step}")
        return tensors

    return dist.on_all_ranks(load)


def warn_of_difference(dist, was, now):
    """Say in one line what differs from the machine on which the checkpoint was written."""
    names = ("packages", "cuda", "device_name", "threads", "world_size", "dtype", "deterministic")
    different = [f"{name} was {was.get(name)}, is {now[name]}" for name in names if was.get(name) != now[name]]
    if different:
        dist.print0(f"warning    the run goes on with the same rows, but not to the same bits: {'; '.join(different)}")


def check_nodes(dist, tokenizer, shards):
    """Raise DataError on all ranks if one, on another machine, has another tokenizer or other shards than rank 0."""
    opened = [[shard.name, shard.text_bytes, shard.group_rows] for shard in (*shards.train, shards.validation)]
    here = {"tokenizer": tokenizer.sha256(), f"shards in {shards.folder}": opened}
    there = list(dist.broadcast_object(list(here.values())))

    def check():
        for (name, found), expected in zip(here.items(), there, strict=True):
            if found != expected:
                raise DataError(f"rank {dist.rank} has not the {name} that rank 0 has: every node needs the same files")

    dist.on_all_ranks(check)
