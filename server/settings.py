"""Every setting of the server: flags over environment (SACCADE_*) over a TOML file over the defaults."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from saccade.errors import InvalidInput

PREFIX = "SACCADE_"
CONFIG_VARIABLE = "SACCADE_CONFIG"
_ENDPOINT = r"\s*([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}\s*"
ORIGIN = r"\s*https?://[A-Za-z0-9.:\[\]-]+\s*"
_RATIO = "[1-9][0-9]{0,3}:[1-9][0-9]{0,3}"
RATIOS = rf"^({_RATIO}(,{_RATIO}){{0,15}})?$"
ENDPOINTS = rf"^{_ENDPOINT}(,{_ENDPOINT})*$"


class Settings(BaseSettings):
    """What an operator may turn. Field descriptions are the help texts of flags and of docs/settings.md."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    backend: Literal["embedded", "triton"] = Field(
        "embedded", description="Where the graphs run: in this process, or in Triton."
    )
    triton_url: str = Field(
        "127.0.0.1:8001",
        pattern=ENDPOINTS,
        description="Triton's gRPC endpoints, host:port; several of one repository are separated by commas.",
    )
    triton_timeout_s: float = Field(10, gt=0, description="Longest one call to Triton may take, retries included.")
    triton_concurrency: int = Field(4, ge=1, le=64, description="Batches in flight for each name in `triton_url`.")
    model_repository: Path | None = Field(
        None, description="Directory in Triton's layout; by default ./model_repository, else the checkout's."
    )
    model: str | None = Field(None, description="Which denoiser of the repository to serve; needed if it has several.")
    model_file: Path | None = Field(
        None,
        description="File that holds the name of the model to serve, looked at every second: a new name moves the "
        "server to that model without dropping a request. `model` then holds only while the file names none at start.",
    )
    engine: Literal["auto", "openvino", "onnxruntime"] = Field("auto", description="What runs the graphs.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Arithmetic of the graphs' linear layers.")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the engine; by default the physical cores."
    )
    streams: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Batches that the engine runs at once, each on its share of `threads`; one without company gets "
        "them all. By default a quarter of the threads for small models on OpenVINO, and else one. More than one takes "
        "the graphs' memory twice and that of a batch as often.",
    )
    ratios: str = Field(
        "",
        pattern=RATIOS,
        description="Ratios of width to height, as 4:3,16:9. For pictures like that, at the model's default size, "
        "graphs of fixed size are compiled at the start: faster, for more memory and a slower start. Empty: none.",
    )
    batch_size: int | None = Field(
        None, ge=1, le=1024, description="Most rows in one batch; by default the knee, measured at start-up."
    )
    max_pixels: int = Field(20_000_000, ge=64, description="Most pixels of one picture.")
    max_upload_bytes: int = Field(32 * 2**20, ge=1024, description="Most bytes of one picture file.")
    max_frames: int = Field(120, ge=1, le=10_000, description="Most pictures, or frames of a video, in one request.")
    max_clip_bytes: int = Field(
        64 * 2**20, ge=1024, description="Most bytes of a video file, or of all pictures of one request together."
    )
    max_clip_pixels: int = Field(
        64_000_000, ge=64, description="Most pixels of all pictures, or of the frames of a video, of one request."
    )
    video_timeout_s: float = Field(20, gt=0, description="Longest a video may take to decode.")
    max_steps: int = Field(100, ge=1, le=1000, description="Most DDIM steps a request may ask for.")
    max_ensemble_size: int = Field(20, ge=1, le=1000, description="Most ensemble members a request may ask for.")
    max_processing_resolution: int = Field(
        768, ge=16, le=16384, description="Largest longer edge, in pixels, that the model is given."
    )
    queue_limit: float = Field(
        1000,
        gt=0,
        description="Work admitted at once, in denoising steps of 256 x 256 px; more is answered with 429. "
        "A single request is always admitted when nothing else is pending.",
    )
    latent_cache_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Most bytes of encoded pictures kept, a repeated one is not encoded again.",
    )
    answer_cache_bytes: int = Field(
        0, ge=0, description="Most bytes of whole answers kept; with any, answers have an ETag. 0: none."
    )
    request_timeout_s: float = Field(
        120, gt=0, description="Longest a request may take, upload and queue each counted on its own."
    )
    drain_timeout_s: float = Field(30, gt=0, description="After SIGTERM, longest wait for accepted requests to finish.")
    readiness_ttl_s: float = Field(5, ge=0, description="How long a readiness result is kept.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")
    jobs_file: Path | None = Field(
        None,
        description="SQLite file of the jobs, which outlive the process; `off`: none. By default jobs-PORT.sqlite in "
        "$STATE_DIRECTORY, $XDG_STATE_HOME/saccade or ~/.local/state/saccade, and none where that cannot be written or "
        "`port` is 0.",
    )
    jobs_limit: int = Field(1000, ge=1, description="Most jobs kept, finished ones included; more get 429.")
    jobs_max_bytes: int = Field(
        4 * 2**30,
        ge=2**20,
        description="Most bytes of kept requests and results; when results alone fill it, jobs wait until some go.",
    )
    jobs_keep_s: float = Field(86400, gt=0, description="How long a finished job's result is kept.")
    jobs_at_once: int = Field(2, ge=1, le=256, description="Jobs that run at the same time.")
    jobs_timeout_s: float = Field(3600, gt=0, description="Longest a job may run.")
    webhook_secret_file: Path | None = Field(
        None, description="File of the secret that webhooks are signed with; without one there are no webhooks."
    )
    webhook_allow_private: bool = Field(
        False, description="Let webhooks go to private addresses, and over http: for tests and closed networks."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or JSON for machines.")
    keys_file: Path | None = Field(
        None, description="TOML file of API keys, looked at every second; without one everybody may ask."
    )
    cors_origins: str | None = Field(
        None,
        pattern=rf"^(\*|{ORIGIN}(,{ORIGIN})*)$",
        description="Web pages that may ask, by origin: https://example.org; commas between several, * for all.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the certificate and its chain: turns HTTPS on.")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key, without a passphrase.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of authorities: only clients with a certificate of theirs may connect."
    )
    memory_limit_bytes: int | None = Field(
        None, ge=2**20, description="Most resident memory; by default what the control group or the machine has."
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="Share of the memory limit beyond which work is refused with 503."
    )
    stuck_after_s: float = Field(
        60, gt=0, description="An engine that is busy and finishes no batch for so long is reported stuck: not ready."
    )
    drain_delay_s: float = Field(
        0.5, ge=0, description="After SIGTERM, how long new connections are still accepted, until others know."
    )
    otlp_endpoint: str | None = Field(
        None, description="Where traces go (OTLP over HTTP); by default OTEL_EXPORTER_OTLP_ENDPOINT; nowhere without."
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Triton's, each once."""
        return tuple(dict.fromkeys(part.strip() for part in self.triton_url.split(",")))

    @property
    def origins(self) -> tuple[str, ...]:
        """Those that CORS lets in."""
        return tuple(origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip())

    @property
    def triton_batches(self) -> int:
        """Worth having in flight at once, over all endpoints."""
        return self.triton_concurrency * len(self.endpoints)

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Settings:
        """Settings from `flags` (None: not given), the environment, and the TOML file `config` or $SACCADE_CONFIG.

        Raises InvalidInput that names the setting at fault.
        """
        file = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
        if file is not None and not file.is_file():
            raise InvalidInput(f"the settings file does not exist: {file}", param="config")
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return _with_file(file)(**given)
        except ValidationError as error:
            raise _refusal(error) from error
        except ValueError as error:  # TOML that does not parse, an environment value that is no JSON
            raise InvalidInput(f"the settings cannot be read: {error}", param="config") from error


def _with_file(file: Path | None) -> type[Settings]:
    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            toml = () if file is None else (TomlConfigSettingsSource(settings_cls, toml_file=file),)
            return (init_settings, env_settings, *toml)

    return FromFile


def _refusal(error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "config"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        return InvalidInput(f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else ""), param=name)
    return InvalidInput(f"setting {name}: {first['msg']} (given: {first['input']!r})", param=name)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def table() -> str:
    """docs/settings.md."""
    rows = [
        f"| `{name}` | `{PREFIX}{name.upper()}` | `{flag(name)}` | {_default(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join([_HEAD, *rows, ""])


def _default(value: object) -> str:
    return "" if value is None else f"`{value}`"


_HEAD = """# Settings of the server

Flags of `saccade serve` win over the environment, the environment over a TOML file (`--config` or `SACCADE_CONFIG`; the
names of the first column are its keys), the file over the defaults. This table is made by `python -m server.settings`.

| setting | environment | flag | default | meaning |
|---|---|---|---|---|"""


if __name__ == "__main__":
    import sys

    sys.stdout.write(table())
