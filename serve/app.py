"""The application: endpoints, errors and life span."""

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from halve.environment import halve_version
from serve import chat, translations
from serve.errors import ApiError
from serve.guard import Guard
from serve.models import Model
from serve.registry import OpenTranslator
from serve.schemas import ErrorBody, ModelCard, ModelList, definitions
from serve.service import Service
from serve.settings import ServeSettings

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/recorder.js": ("recorder.js", "text/javascript; charset=utf-8"),
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src 'self' data:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "x-should-retry",
    "x-halve-audio-seconds",
    "x-halve-coverage",
    "x-halve-ignored",
    "x-halve-language",
    "x-halve-processing-ms",
    "x-halve-tokens",
)
"""What pages elsewhere may read of an answer, beside its body."""


def create_app(
    settings: ServeSettings,
    *,
    open_translator: OpenTranslator | None = None,
    service: Service | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        settings: what is served, and the limits.
        open_translator: opens a model's path; the packages' runtime by default.
        service: one made already from the same settings.

    Raises:
        InputError: the settings cannot be used.
    """
    service = service or Service(settings, open_translator)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="halve",
        description="Speech translation with OpenAI's API, served from this machine.",
        version=halve_version(),
        lifespan=lifespan,
        # The framework's own pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(translations.router)
    app.include_router(chat.router)
    _add_information(app, service)
    _add_page(app)
    _add_errors(app)
    _complete_document(app, service)
    app.add_middleware(Guard, service=service)
    if settings.allow_origins:
        # Outside the guard: a page may read a refusal only if it too carries these headers.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            # OpenAI's client sends a dozen of its own, x-stainless-…
            allow_headers=["*"],
            # A page of the internet may ask a server at home, if it is one of these.
            allow_private_network=True,
            expose_headers=list(EXPOSED_HEADERS),
        )
    return app


def _card(model: Model) -> ModelCard:
    return ModelCard(
        id=model.id,
        created=model.created_s,
        loaded=model.is_loaded,
        languages=None if model.languages is None else list(model.languages),
        default_language=model.default_lang,
        max_audio_s=model.max_audio_s,
    )


def _add_information(app: FastAPI, service: Service) -> None:
    models = service.registry.models

    @app.get("/v1/models", responses={"4XX": {"model": ErrorBody}})
    async def list_models() -> ModelList:
        """The models that can be asked for."""
        return ModelList(data=[_card(model) for model in models.values()])

    @app.get("/v1/models/{model_id:path}", responses={"4XX": {"model": ErrorBody}})
    async def get_model(model_id: str) -> ModelCard:
        """One model."""
        return _card(service.registry.find(model_id))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """That the process answers."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"model": dict[str, str]}})
    async def ready() -> JSONResponse:
        """Whether new work is welcome: 200, or 503 while shutting down or without a model."""
        status = "ready" if service.registry.is_ready else "no model"
        status = "draining" if service.is_draining else status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        for model in models.values():
            service.metrics.loaded.labels(model.id).set(model.is_loaded)
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _complete_document(app: FastAPI, service: Service) -> None:
    """Adds to /openapi.json what the bodies read by hand refer to, and what this server serves."""
    make = app.openapi

    def document() -> dict[str, Any]:
        found = make()
        found.setdefault("components", {}).setdefault("schemas", {}).update(definitions())
        for path in ("/v1/audio/translations", "/v1/chat/completions"):
            content = found["paths"][path]["post"]["requestBody"]["content"]
            for body in content.values():
                # A copy: the schema is the module's own, and servers of one process differ.
                schema = body["schema"] = copy.deepcopy(body["schema"])
                if service.settings.api_key_file is None:  # names are for those who have the key
                    schema["properties"]["model"]["enum"] = list(service.registry.models)
        return found

    app.openapi = document  # type: ignore[method-assign]


def _add_page(app: FastAPI) -> None:
    def add(path: str, name: str, media_type: str) -> None:
        content = (PAGE / name).read_bytes()
        headers = {"content-security-policy": PAGE_POLICY}

        async def page() -> Response:
            return Response(content, media_type=media_type, headers=headers)

        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    for path, (name, media_type) in PAGE_FILES.items():
        add(path, name, media_type)


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, headers=error.headers())

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, f"{error.detail}.", code=str(error.status_code))
        return JSONResponse(found.body(), error.status_code, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        found = ApiError(422, "The request cannot be understood.", code="invalid_request")
        return JSONResponse(found.body(), 422)

    handlers: dict[Any, Any] = {
        ApiError: refused,
        HTTPException: http_error,
        RequestValidationError: invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
