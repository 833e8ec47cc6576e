"""Stand-ins for wandb, without its network: they keep what they are given."""

import types
from pathlib import Path
from types import SimpleNamespace


class FakeWandb(types.ModuleType):
    """Stands in for wandb: records what it is given, keeps an id as long as the real one does, fails where told to."""

    def __init__(self, failing=(), key=True):
        super().__init__("wandb")
        self.failing, self.key, self.taken, self.done = set(failing), key, set(), []
        self.url, self.dir, self.id = "https://wandb/run", "/somewhere/offline-run/files", None

    def note(self, what, /, *arguments, **named):
        self.done.append((what, *arguments, *([named] if named else [])))
        if what in self.failing or "everything" in self.failing:
            raise ConnectionError(f"no {what}\nsecond line")

    def Settings(self, **settings):
        return settings

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

    def Table(self, columns, data):
        self.note("Table")
        return ("table", columns, data)

    def Histogram(self, np_histogram):
        return ("histogram", *np_histogram)

    def Artifact(self, name, kind, metadata):
        self.note("Artifact")
        return FakeArtifact(name, kind, metadata)

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
    """A wandb artifact as a dict of files; `api` gives it back as wandb's own does."""

    version = "v3"

    def __init__(self, name, kind, metadata):
        self.name, self.kind, self.metadata, self.files, self.new = name, kind, metadata, {}, None

    def add_file(self, path, name, policy):
        self.files[name] = Path(path).read_bytes()

    def add_dir(self, path, name, policy):
        for file in Path(path).iterdir():
            self.add_file(file, f"{name}/{file.name}", policy)

    def new_file(self, name, encoding):
        return _Writer(self.files, name)

    def download(self, root, skip_cache):
        for name, data in self.files.items():
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(data)
        return root

    @property
    def api(self):
        def artifact(path, type):
            assert (path, type) == (f"me/nanotrain/{self.name}:best", self.kind)
            return self

        return SimpleNamespace(artifact=artifact)


class _Writer:
    def __init__(self, files, name):
        self.files, self.name, self.text = files, name, ""

    def write(self, text):
        self.text += text

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.files[self.name] = self.text.encode()
