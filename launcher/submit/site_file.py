"""A site: what one cluster calls its partitions and wants in a job script, read from one TOML file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.errors import RequestError, nearest, printable
from halfstep.launcher.submit.times import seconds
from halfstep.launcher.system import assets, foreign
from halfstep.launcher.system.files import reason
from halfstep.launcher.topology import Topology

# As WANDB_API_KEY and HF_TOKEN end, and TOKENIZERS_PARALLELISM or HF_TOKEN_PATH do not.
_SECRET = ("APIKEY", "AUTH", "CREDENTIAL", "KEY", "PASSPHRASE", "PASSWD", "PASSWORD", "SECRET", "TOKEN")
_SECRET_ENDS = ("APIKEY", "PASSWD", "PASSWORD", "SECRET", "TOKEN")
_LARGEST = 1 << 20
"""Bytes of a site's file."""
DEFAULT = "default"
"""The user's own site of this name is taken where none is named."""


def _one_line(text: str) -> str:
    if printable(text) != text:
        raise ValueError("may not hold a line break or another control character")
    return text


def _slurm_word(text: str) -> str:
    # sbatch splits #SBATCH lines by rules of its own, and no cluster has a partition with a quote in its name.
    if not re.fullmatch(r"[\w.,:+@/=&|!()\[\]*%-]*", text, re.ASCII):
        raise ValueError("may hold letters, digits and . , : + @ / = & | ! ( ) [ ] * % - only")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("is no name of an environment variable")
    return text


def _no_secrets(variables: dict[str, str]) -> dict[str, str]:
    # A job script is a file that SLURM copies, shows and keeps.
    for name, value in variables.items():
        if secret(name, value):
            raise ValueError(f"{name} is a secret, which has no place in a job script")
    return variables


def _no_secrets_set(lines: list[str]) -> list[str]:
    for line in lines:
        for name, value in re.findall(r"\b([A-Za-z_][A-Za-z0-9_]*)=[\"']?([^\s;\"']+)", line):
            if secret(name, value):
                raise ValueError(f"sets {name}, a secret, which has no place in a job script")
    return lines


def secret(name: str, value: str) -> bool:
    """Tell whether a variable holds a secret: by its name, or as the password in an address."""
    if re.search(r"://[^/\s:@]*:[^/\s@]+@", value):
        return True
    # What says where a secret lies, or how many there are, is none.
    if value.startswith(("/", "~", "$", "`", ".")) or re.fullmatch(r"[0-9.]{0,9}|true|false|auto|none", value.lower()):
        return False
    last = name.upper().rpartition("_")[2]
    return last.removesuffix("S") in _SECRET or last.endswith(_SECRET_ENDS) or last in ("KEY", "PASS", "PAT")


def _site_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", text):
        raise ValueError("is no name of a site: it stands in every job script")
    return text


def _minutes(text: str) -> str:
    seconds(text)
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, AfterValidator(_slurm_word)]
Variable = Annotated[str, AfterValidator(_name)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Slurm(_Table):
    """What sbatch is asked for."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Annotated[Word, AfterValidator(_minutes)] = "1-00:00:00"
    """The limit of one job; a run that needs longer requeues."""
    signal: Literal["USR1", "USR2", "TERM"] = "USR1"
    notice: int = Field(default=300, ge=10)
    """Seconds before the limit at which the ranks are told to save and stop; SLURM may be up to a minute early."""
    memory: Word | None = None
    """Per node; `0` = all of it."""
    exclusive: bool = False
    options: list[Line] = []
    """More words for sbatch, such as `--reservation=maintenance`."""


class Node(_Table):
    """What a node has."""

    gpus: int = Field(default=0, ge=0)
    gpu_type: Word | None = None
    """As SLURM calls it, in `--gres=gpu:TYPE:N`."""
    hardware: str | None = None
    """As Halfstep calls it (the run key `hardware`)."""
    cuda_compiler: bool = True
    """Whether nvcc is there, after modules and setup: DeepSpeed's fused Adam needs it."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    interface: Word | None = None
    """The network that ranks talk over, such as `ib0`."""


class Environment(_Table):
    """What the ranks find."""

    python: Line | None = None
    """The interpreter on the compute nodes; default: the one that submits, in a container `python`."""
    modules: list[Line] = []
    setup: Annotated[list[Line], AfterValidator(_no_secrets_set)] = []
    """Lines of bash, run as they stand, after the modules."""
    variables: Annotated[dict[Variable, Line], AfterValidator(_no_secrets)] = {}
    forward: list[Variable] = []
    """Variables that a job takes from the shell that submits it; nothing else of that shell gets there."""
    shared: list[Line] = []
    """Folders that all nodes see; a run directory and data elsewhere are refused."""


class Container(_Table):
    """Where the ranks run in an image."""

    kind: Literal["apptainer", "pyxis"]
    image: Line
    mounts: list[Line] = []
    """Folders of the host, as `/scratch` or `/scratch:/data`."""
    options: list[Line] = []


class Site(_Table):
    """One cluster."""

    name: Annotated[str, AfterValidator(_site_name)]
    description: Line = ""
    slurm: Slurm = Slurm()
    node: Node = Node()
    environment: Environment = Environment()
    container: Container | None = None


def folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return where sites are looked for: the user's configuration folder, then those that ship with Halfstep."""
    base = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [base / "halfstep" / "sites", assets.folder("slurm") / "sites"]


def known(environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Return the sites that can be named, the user's own before those that ship."""
    sites: dict[str, Path] = {}
    for folder in folders(environ):
        for file in sorted(folder.glob("*.toml")):
            sites.setdefault(file.stem, file)
    return sites


def read(name: str | None, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Site:
    """Return a site by name, or from a file whose name ends in .toml, with the values that were `given` for this job.

    `given` has keys of the table `slurm`; None leaves what the site says. Without a name it is that of HALFSTEP_SITE,
    else the user's `default`, else `gpu`, which asks for nothing special.
    Raises RequestError where there is no such site, or something in it is wrong.
    """
    where = "--site"
    sites = known(environ)
    if name is None and environ.get("HALFSTEP_SITE"):
        name, where = environ["HALFSTEP_SITE"], "HALFSTEP_SITE"
    if name is None:
        name = DEFAULT if DEFAULT in sites else "gpu"
    file = Path(name) if name.endswith(".toml") else sites.get(name)
    if file is None:
        near = nearest(name, sites)
        raise RequestError(
            f"there is no site {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
            where=f"{where} {name}",
            fix=f"known sites: {', '.join(sorted(sites))}; yours go into {folders(environ)[0]}/NAME.toml",
        )
    try:
        tree = foreign.read_toml(file, _LARGEST, follow=True)
    except OSError as error:
        raise RequestError(f"the site cannot be read: {reason(error)}", where=str(file), fix="check --site") from None
    except ValueError as error:
        raise RequestError(f"the site is not TOML: {error}", where=str(file), fix="correct that line") from None
    own = {key: value for key, value in (given or {}).items() if value is not None}
    slurm = tree.get("slurm", {})
    if not isinstance(slurm, dict):
        raise RequestError("slurm is a table, not a value", where=str(file), fix="write [slurm] above its keys")
    try:
        slurm = {**slurm, **own}
        return Site.model_validate({**tree, "slurm": slurm, "name": file.stem})
    except ValidationError as error:
        problems = [_problem(file, own, details) for details in error.errors()]
        raise problems[0].with_more(problems[1:]) from None


def _problem(file: Path, own: dict[str, Any], error: Any) -> RequestError:
    path = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(path)
    if path == ["name"]:
        return RequestError(
            f"the name of the site's file, {file.stem!r}, {_said(error)}",
            where=str(file),
            fix="rename the file: letters, digits and . _ + - only",
        )
    if path[0] == "slurm" and path[-1] in own:
        what = f"--{path[-1]} {error.get('input')}: {_said(error)}"
        return RequestError(what, where="the command line", fix=f"correct it, or leave --{path[-1]} out")
    if error["type"] == "extra_forbidden":
        near = nearest(path[-1], _keys(path[:-1]))
        fix = f"did you mean {near[0]}?" if near else f"known here: {', '.join(_keys(path[:-1]))}"
        return RequestError(f"{key} is no key of a site", where=str(file), fix=fix)
    said, value = _said(error), error.get("input")
    if "secret" in said and path[:1] == ["environment"]:
        return RequestError(
            f"{key}: {said}",
            where=str(file),
            fix="name it in environment.forward instead, and set it in the shell that submits",
        )
    # What a variable holds is nobody's business, whatever is wrong with it.
    shown = "" if path[:2] == ["environment", "variables"] else f" = {str(value)[:200]!r}"
    return RequestError(f"{key}{shown}: {said}", where=str(file), fix=f"correct {key} in that file")


def _said(error: Any) -> str:
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _keys(path: list[str]) -> list[str]:
    tables: dict[str, type[BaseModel]] = {
        "slurm": Slurm,
        "node": Node,
        "environment": Environment,
        "container": Container,
    }
    model: type[BaseModel] = tables.get(path[0], Site) if path else Site
    return [name for name in model.model_fields if name != "name"]


def site_topology(site: Site, spec: RunSpec) -> Topology:
    """Return the ranks that a site would start for a request."""
    gpus = site.node.gpus
    ranks_per_node = spec.gpus_per_node or gpus or 2
    return Topology(
        world_size=(spec.nodes or 1) * ranks_per_node,
        ranks_per_node=ranks_per_node,
        accelerator="cuda" if gpus else "cpu",
        fused_adam=bool(gpus) and site.node.cuda_compiler,
        device_name=(spec.hardware or site.node.hardware or "") if gpus else "",
    )
