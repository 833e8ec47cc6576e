"""A stand-in for wandb, without its service and its network: it keeps what it is given."""

import types
from pathlib import Path


class FakeWandb(types.ModuleType):
    """Stands in for wandb and its run: records what it is given, keeps an id as long as the real one does, fails where
    told to.
    """

    def __init__(self, failing=(), key=True):
        super().__init__("wandb")
        self.failing, self.key, self.taken, self.done = set(failing), key, set(), []
        self.url, self.dir, self.id = "https://wandb/run", "/somewhere/offline-run/files", None
        self.Settings, self.Artifact = dict, FakeArtifact

    def note(self, what, /, *arguments, **named):
        self.done.append((what, *arguments, *([named] if named else [])))
        if what in self.failing or "everything" in self.failing:
            raise ConnectionError(f"no {what}\nsecond line")

    def setup(self, settings):
        self.note("setup", settings["mode"])

    def login(self, prompt, verify):
        assert (prompt, verify) == (False, False), "it would ask, or wait for the server"
        self.note("login")
        return self.key

    def init(self, id, mode, **options):
        self.note("init", mode, id=id, **options)
        if id in self.taken:
            raise RuntimeError(f"run ID {id} is in use")
        self.taken.add(id)
        if mode in self.failing:
            raise ConnectionError(f"no {mode}")
        self.id = id
        return self

    def teardown(self):
        self.note("teardown")
        self.taken.clear()

    def define_metric(self, name, **options):
        self.note("define_metric", name, **options)

    def log(self, row):
        self.note("log", row)

    def log_artifact(self, artifact, aliases):
        self.note("log_artifact", artifact, aliases)

    def finish(self, exit_code):
        self.note("finish", exit_code)

    def of(self, name):
        """The arguments of every call of `name`."""
        return [arguments for what, *arguments in self.done if what == name]


class FakeArtifact:
    """A wandb artifact as a dict of files."""

    def __init__(self, name, kind):
        self.name, self.kind, self.files = name, kind, {}

    def add_file(self, path, name, policy):
        self.files[name] = Path(path).read_bytes()

    def add_dir(self, path, name, policy):
        for file in Path(path).iterdir():
            self.add_file(file, f"{name}/{file.name}", policy)
