"""The tools in the words of the protocol, through its official package, which is an extra.

It is imported at the first request, in a thread: it takes as long as the rest of the server.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from starlette.requests import Request

from sfumato import __version__
from sfumato.api.http import errors
from sfumato.api.mcp.tools import TOOLS, Answer, Call, Shown
from sfumato.errors import NotInstalled
from sfumato.pictures.gallery import Gallery
from sfumato.serving.service import Service

INSTRUCTIONS = (
    "Draws and edits pictures. Show each picture, or its link, to the user. A link of an earlier answer can be the "
    "image of edit_image. A picture may take minutes: with wait: false there is an answer at once, and get_progress "
    "has the picture later."
)


class Protocol:
    """The package's server and its sessions: `handle` answers one HTTP request.

    Raises NotInstalled if the package is not there. Slow.
    """

    def __init__(self, service: Service, gallery: Gallery) -> None:
        try:
            # Not import statements: the package is an extra.
            self._types = importlib.import_module("mcp_types")
            lowlevel = importlib.import_module("mcp.server.lowlevel")
            manager = importlib.import_module("mcp.server.streamable_http_manager")
            self._auth = importlib.import_module("mcp.server.auth.middleware.bearer_auth")
            self._tokens = importlib.import_module("mcp.server.auth.provider")
            self._streams = importlib.import_module("sse_starlette.sse")
            self._errors = importlib.import_module("mcp.shared.exceptions")
        except ImportError as error:
            raise NotInstalled(
                "the Model Context Protocol needs the extra mcp: `pip install 'sfumato[mcp]'`, and restart the server "
                f"({error})"
            ) from error
        logging.getLogger("mcp").setLevel(logging.WARNING)  # it logs the ids of sessions, which are secrets
        self._service, self._gallery = service, gallery
        server = lowlevel.Server(
            "sfumato",
            version=__version__,
            title="Sfumato",
            instructions=INSTRUCTIONS,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )
        self._keyed = bool(service.settings.api_keys)
        # Origin and Host are checked by `http.cross_site`, which knows the settings.
        self.manager = manager.StreamableHTTPSessionManager(
            server, max_request_body_size=service.settings.max_body_mb * 2**20
        )

    def finish_calls(self) -> None:
        """Streams go on while the server waits for running requests; by itself the package cuts them off."""
        self._streams.AppStatus.disable_automatic_graceful_drain()

    def user(self, caller: str) -> Any:
        """For a session that only the key may use that began it; None without keys."""
        if not self._keyed:
            return None
        return self._auth.AuthenticatedUser(self._tokens.AccessToken(token="", client_id=caller, scopes=[]))

    async def _list(self, context: Any, params: Any) -> Any:
        types = self._types
        tools = [
            types.Tool(
                name=name,
                title=tool.title,
                description=tool.description,
                input_schema=tool.schema,
                annotations=types.ToolAnnotations(
                    title=tool.title, read_only_hint=tool.reads, destructive_hint=False, open_world_hint=False
                ),
            )
            for name, tool in TOOLS.items()
        ]
        return types.ListToolsResult(tools=tools)

    async def _call(self, context: Any, params: Any) -> Any:
        if params.name not in TOOLS:
            code = self._types.INVALID_PARAMS
            raise self._errors.MCPError(code, f"there is no tool {params.name[:100]!r}; there are {', '.join(TOOLS)}")
        request: Request = context.request
        call = Call(request, self._service, self._gallery, context.session.report_progress)
        try:
            answer = await TOOLS[params.name].run(call, params.arguments or {})
        except Exception as error:  # what is wrong with a call is told to the model, which can mend it
            message = errors.shape(errors.reported(error))["error"]["message"]
            return self._types.CallToolResult(content=[self._text(str(message))], is_error=True)
        return self._result(answer)

    def _result(self, answer: Answer) -> Any:
        content = [block for shown in answer.pictures for block in self._blocks(shown)]
        content.append(self._text(answer.text))
        return self._types.CallToolResult(content=content, structured_content=answer.value)

    def _blocks(self, shown: Shown) -> list[Any]:
        blocks = []
        if shown.data is not None:
            blocks.append(self._types.ImageContent(data=shown.data, mime_type=shown.media_type))
        if shown.url is not None:
            link = self._types.ResourceLink(
                uri=shown.url, name=shown.name, mime_type=shown.media_type, size=shown.bytes
            )
            blocks.append(link)
        return blocks

    def _text(self, text: str) -> Any:
        return self._types.TextContent(text=text)
