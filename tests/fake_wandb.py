"""Stand-ins for wandb, without its service and its network: they keep what they are given."""

import types
from contextlib import contextmanager
from io import StringIO
from pathlib import Path


class FakeWandb(types.ModuleType):
    """Stands in for wandb, its run and its Api: records what it is given, keeps an id as long as the real one does,
    fails where told to.
    """

    def __init__(self, failing=(), key=True):
        super().__init__("wandb")
        self.failing, self.key, self.taken, self.done = set(failing), key, set(), []
        self.url, self.dir, self.id = "https://wandb/run", "/somewhere/offline-run/files", None
        self.Settings, self.Api = dict, lambda: self

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

    def Table(self, columns, data):
        self.note("Table")
        return ("table", columns, data)

    def Histogram(self, np_histogram):
        return ("histogram", *np_histogram)

    def Artifact(self, name, kind, metadata):
        self.note("Artifact")
        return FakeArtifact(name, kind, metadata)

    def artifact(self, path, type):
        """What the Api finds: the last artifact logged under the name and alias of `path`."""
        name, _, alias = path.rpartition("/")[2].partition(":")
        found = [artifact for artifact, aliases in self.of("log_artifact") if alias in aliases]
        assert (found[-1].name, found[-1].kind) == (name, type)
        return found[-1]

    def of(self, name):
        """The arguments of every call of `name`."""
        return [arguments for what, *arguments in self.done if what == name]


class FakeArtifact:
    """A wandb artifact as a dict of files."""

    version = "v3"

    def __init__(self, name, kind, metadata):
        self.name, self.kind, self.metadata, self.files = name, kind, metadata, {}

    def add_file(self, path, name, policy):
        self.files[name] = Path(path).read_bytes()

    def add_dir(self, path, name, policy):
        for file in Path(path).iterdir():
            self.add_file(file, f"{name}/{file.name}", policy)

    @contextmanager
    def new_file(self, name, encoding):
        file = StringIO()
        yield file
        self.files[name] = file.getvalue().encode(encoding)

    def download(self, root, skip_cache):
        for name, data in self.files.items():
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(data)
