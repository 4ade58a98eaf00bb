"""The HTTP application: routes and errors."""

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from fairy_compile import __version__
from fairy_compile.errors import FairyError
from fairy_compile.serve.api_error import ApiError
from fairy_compile.serve.exchange import Exchange
from fairy_compile.serve.hosts import HostCheck, OwnNames
from fairy_compile.serve.metrics import Metrics
from fairy_compile.serve.middleware import ApiKey, BodyLimit, Counting, error_response, wrong_host
from fairy_compile.serve.protocol import ChatRequest, CompletionRequest
from fairy_compile.serve.replies import ChatReply, CompletionReply, Reply
from fairy_compile.serve.service import Service
from fairy_compile.serve.worker import EngineThread

DEFAULT_MAX_BODY = 4 << 20
_CLIENT_CLOSED = 499  # nginx's status for clients that left; only metrics see it
_PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def create_app(
    engine: EngineThread,
    model_name: str,
    *,
    api_key: str | None = None,
    max_body: int = DEFAULT_MAX_BODY,
    host: str = "127.0.0.1",
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """Return the application that serves ``engine``.

    Args:
        engine: runs the model; the caller closes it.
        model_name: what clients call the model.
        api_key: asked of every request but those for ``/health``; None asks for none.
        max_body: most bytes of a request's body.
        host: address the server listens at.
        allowed_hosts: other names it answers to, see `hosts.OwnNames`.
    """
    metrics = Metrics(engine)
    service = Service(engine, metrics, model_name)
    app = FastAPI(title="fairy_compile", version=__version__)
    app.add_middleware(BodyLimit, limit=max_body)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    names = OwnNames(host, allowed_hosts)
    app.add_middleware(HostCheck, names=names, refuse=wrong_host)
    app.add_middleware(Counting, metrics=metrics, paths=_PATHS)
    _handle_errors(app)
    _add_state_routes(app, service)
    _add_model_routes(app, service)
    return app


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether requests are served."""
        load = service.engine.load
        alive = service.engine.alive
        state = {"status": "ok" if alive else "closing"}
        state |= {"running": load.running, "waiting": load.waiting}
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return PlainTextResponse(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    description = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "fairy_compile",
        "max_model_len": service.engine.model.engine.context,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model by its name."""
        if name != service.model_name:
            raise ApiError(404, f"there is no model {name!r} here", code="model_not_found")
        return description

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        service.check_room()
        requests = await asyncio.to_thread(service.completion_requests, body)
        reply = CompletionReply(
            service.model_name,
            service.token_bytes,
            logprobs=body.logprobs is not None,
            usage=body.include_usage,
        )
        return await _respond(reply, service.start(requests, body.n, body.stream), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_room()
        requests = await asyncio.to_thread(service.chat_requests, body)
        reply = ChatReply(
            service.model_name,
            service.token_bytes,
            logprobs=bool(body.logprobs),
            usage=body.include_usage,
            readers=service.tool_readers(body),
        )
        return await _respond(reply, service.start(requests, body.n, body.stream), request)


async def _respond(reply: Reply, exchange: Exchange, request: Request) -> Response:
    if exchange.stream:
        return _AnswerStream(reply, exchange)
    whole = await _unless_client_leaves(reply.whole(exchange), request)
    if whole is None:
        exchange.cancel()
        return Response(status_code=_CLIENT_CLOSED)
    return JSONResponse(whole)


class _AnswerStream(StreamingResponse):
    """Ends its answers when the client leaves, also before the first part was sent."""

    def __init__(self, reply: Reply, exchange: Exchange):
        super().__init__(
            reply.stream(exchange),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def _unless_client_leaves(work: Awaitable[Any], request: Request) -> Any:
    """Return the result of ``work``, or None if the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        leaving.cancel()


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(FairyError)
    async def user_error(request: Request, error: FairyError) -> Response:
        return error_response(ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(
            ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_explain(error.errors()))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        message = "the server failed in a way it should not; its log says more"
        return error_response(ApiError(500, message, kind="server_error"))


def _explain(problems: Sequence[dict[str, Any]]) -> ApiError:
    """Return the first of what pydantic found wrong with a body."""
    # Of the alternatives of a union, the one that fits best fails deepest, or by its value alone.
    same_field = [p for p in problems if p["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(same_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type")))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}")
    if problem["loc"] == ("body",) and problem["type"] in ("missing", "model_attributes_type"):
        return ApiError(
            400, "the body is not a JSON object; send one, with Content-Type: application/json"
        )
    # Inside a union pydantic names the alternative it tried, in words no client knows.
    known = [p for p in problem["loc"][1:] if isinstance(p, int) or _is_field(p)]
    message = problem["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, known))
    return ApiError(
        400,
        f"{where}: {message}" if where else message,
        param=str(known[0]) if known else None,
    )


def _is_field(name: str) -> bool:
    return name.isidentifier() and name not in ("str", "int", "float", "bool")
