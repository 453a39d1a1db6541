"""The executors: where the processes of a comparison, or of recommendations for all users, run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from peso.config.parsing import Section, expand_name, shown
from peso.config.reading import explained, unknown_key
from peso.errors import ConfigError


class ProcessesConfig(Section):
    """Processes on this machine."""

    name: Literal["processes"] = Field("processes", description="the executor")


class RayConfig(Section):
    """Tasks on a Ray cluster."""

    name: Literal["ray"] = Field("ray", description="the executor")
    address: str = Field("auto", description="the cluster; auto: that of RAY_ADDRESS, or of this machine")
    cpus: int = Field(1, ge=1, description="CPUs, and threads, of a task")
    gpus: float = Field(0, ge=0, description="GPUs of a task; 0.5: two tasks share one")


class DaskConfig(Section):
    """Tasks on a Dask cluster."""

    name: Literal["dask"] = Field("dask", description="the executor")
    address: str = Field(description="the scheduler, such as tcp://host:8786")
    cpus: int = Field(1, ge=1, description="threads of a task")
    resources: dict[str, float] = Field(
        {}, description="what a task needs of a worker's `--resources`, such as {GPU: 1}"
    )


class SlurmConfig(Section):
    """Jobs of Slurm, one per task."""

    name: Literal["slurm"] = Field("slurm", description="the executor")
    cpus: int = Field(1, ge=1, description="CPUs, and threads, of a job")
    gpus: int = Field(0, ge=0, description="GPUs of a job")
    memory_gib: float | None = Field(None, gt=0, description="memory of a job; none given: Slurm's default")
    hours: float = Field(24, gt=0, description="time limit of a job; one that reaches it is continued")
    cluster: Literal["slurm", "local"] = Field(
        "slurm", description="local: processes on this machine, to try the configuration"
    )
    options: dict[str, Any] = Field(
        {}, description="further parameters of submitit, such as {slurm_partition: long}"
    )


AnyExecutor = ProcessesConfig | RayConfig | DaskConfig | SlurmConfig


ExecutorConfig = Annotated[Annotated[AnyExecutor, Field(discriminator="name")], BeforeValidator(expand_name)]


def read_executor(value: Any, key: str = "executor") -> AnyExecutor:
    """An executor from its name or its section.

    Args:
        value: the name, or a mapping.
        key: the key of the section, for messages.

    Raises:
        ConfigError: if it is not valid. The message names the key, the value and the nearest valid key.
    """
    try:
        return TypeAdapter[AnyExecutor](ExecutorConfig).validate_python(value)
    except ValidationError as error:
        raise ConfigError(
            explained(error, lambda problem: explain_executor(problem, key, problem["loc"]))
        ) from None


def explain_executor(problem: Any, key: str, loc: tuple[Any, ...]) -> str:
    """A sentence about a problem that pydantic reports.

    Args:
        problem: the problem, one of ``ValidationError.errors()``.
        key: the key of the section.
        loc: the place of the problem within the section, which begins with the name of the executor.
    """
    name, *parts = map(str, loc or ("",))
    full, value = ".".join(filter(None, [key, *parts])), shown(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        (section,) = [s for s in get_args(AnyExecutor) if s.model_fields["name"].default == name]
        return unknown_key(full, value, [f"{key}.{field}" for field in section.model_fields])
    if problem["type"] == "missing":
        return f"{full} is missing"
    if problem["type"].startswith("union_tag"):
        known = ", ".join(section.model_fields["name"].default for section in get_args(AnyExecutor))
        return f"{key}: expected one of {known}, or a section with this name; got {value}"
    return f"{full}: {problem['msg'].removeprefix('Value error, ')}; got {value}"
