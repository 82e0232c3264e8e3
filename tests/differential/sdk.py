"""Runs scenarios through the OpenAI Agents SDK: the oracle of the differential suite.

Reads one JSON object a line, `{"id", "scenario", "api", "model_url", "tools_url"}`, runs them side by side, and writes
`{"id", "runs"}` for each, or `{"id", "error"}` where the scenario itself is wrong. README.md says what a scenario is.
"""

import asyncio
import functools
import json
import re
import sys
import traceback

import httpx2
import jsonschema
import openai
from agents import (
    Agent,
    AgentOutputSchema,
    CodeInterpreterTool,
    FunctionTool,
    GuardrailFunctionOutput,
    ImageGenerationTool,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    ItemHelpers,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelRefusalError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    OutputGuardrail,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    RunState,
    SQLiteSession,
    ToolGuardrailFunctionOutput,
    ToolInputGuardrail,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrail,
    ToolOutputGuardrailTripwireTriggered,
    WebSearchTool,
    handoff,
    set_tracing_disabled,
)
from agents.extensions.handoff_filters import remove_all_tools
from agents.run import DEFAULT_MAX_TURNS
from agents.run_config import ToolExecutionConfig
from agents.strict_schema import ensure_strict_json_schema
from agents.tool import default_tool_error_function
from openai.types.shared import Reasoning
from pydantic_core.core_schema import no_info_plain_validator_function

UPSTREAM = "scripted-1"


@functools.cache
def client_of(model_url, retries):
    """One for all scenarios of a place: a client takes longer to make than most of them take to play."""
    return openai.AsyncOpenAI(base_url=model_url, api_key="test-key", max_retries=retries)


@functools.cache
def http():
    return httpx2.AsyncClient(timeout=60, trust_env=False)


def output_type(schema):
    """The SDK's `AgentOutputSchema` of a type that is known by its JSON Schema."""
    schema = json.loads(json.dumps(schema))
    is_object = schema.get("type") == "object"
    strict = ensure_strict_json_schema(json.loads(json.dumps(schema)))

    def check(value):
        try:
            jsonschema.validate(value, strict)
        except jsonschema.ValidationError as error:
            raise ValueError(error.message) from error
        return value

    # What is an object stands for itself, anything else the SDK wraps.
    hooks = {
        "__get_pydantic_core_schema__": lambda _type, _handler: no_info_plain_validator_function(check),
        "__get_pydantic_json_schema__": lambda _core, _handler: {"type": "object"} if is_object else schema,
    }
    base = dict if is_object else object
    made = AgentOutputSchema(type("Output", (base,), {name: staticmethod(hook) for name, hook in hooks.items()}))
    if is_object:
        # Pydantic would look for the schema's own definitions among its types.
        made._output_schema = strict
    return made


class Play:
    """One scenario, its agents as the SDK's."""

    def __init__(self, request):
        self.scenario = request["scenario"]
        self.tools_url = request["tools_url"]
        client = client_of(request["model_url"], self.scenario.get("retries", 0))
        model = OpenAIChatCompletionsModel if request["api"] == "chat" else OpenAIResponsesModel
        self.model = model(model=UPSTREAM, openai_client=client)
        self.variables = {}
        definitions = self.scenario["agents"]
        # First all of them, then what they know of each other: handoffs may go in circles.
        self.agents = {key: self.agent(key, definition) for key, definition in definitions.items()}
        for key, definition in definitions.items():
            agent = self.agents[key]
            agent.tools = [self.tool(tool, definition) for tool in definition.get("tools", [])]
            agent.handoffs = [self.handoff(item) for item in definition.get("handoffs", [])]
            self.add_guardrails(agent, definition)
        self.start = self.agents[self.scenario.get("start") or next(iter(definitions))]

    def agent(self, key, definition):
        schema = definition.get("outputSchema")
        behaviour = definition.get("toolUseBehavior", "RUN_LLM_AGAIN")
        if behaviour == "STOP_AT_TOOLS":
            behaviour = {"stop_at_tool_names": definition["stopAtTools"]}
        else:
            behaviour = behaviour.lower()
        template = definition.get("instructions", f"You are {key}.")
        return Agent(
            name=definition.get("name", key),
            instructions=(lambda _context, _agent: self.filled_in(template)) if template else None,
            handoff_description=definition.get("handoffDescription"),
            model=self.model,
            model_settings=settings(definition.get("modelSettings") or {}, self.scenario.get("stream")),
            output_type=output_type(schema) if schema is not None else None,
            tool_use_behavior=behaviour,
            reset_tool_choice=definition.get("resetToolChoice", True),
        )

    def filled_in(self, template):
        """Instructions are a function in the SDK: `{{name}}` stands for the run's variable."""
        return re.sub(r"\{\{(\w+)\}\}", lambda name: str(self.variables[name[1]]), template)

    def tool(self, tool, definition):
        ((kind, fields),) = tool.items()
        if kind == "webhook":
            made = self.webhook(fields)
        elif kind == "agent":
            made = self.agents[fields["agent"]].as_tool(
                tool_name=fields["name"],
                tool_description=fields["description"],
                custom_output_extractor=self.extractor(fields["agent"]),
                max_turns=fields.get("maxTurns"),
                needs_approval=fields.get("needsApproval", False),
            )
        elif kind == "hosted":
            return hosted(fields["name"], fields.get("config") or {})
        else:
            raise ValueError(f"no such kind of tool: {kind}")
        at_this = [
            guardrail
            for guardrail in definition.get("guardrails", [])
            if guardrail.get("tool") in (None, fields["name"])
        ]
        made.tool_input_guardrails = [
            ToolInputGuardrail(self.tool_check(guardrail, lambda data: data.context.tool_arguments), guardrail["name"])
            for guardrail in at_this
            if guardrail["stage"] == "TOOL_INPUT"
        ]
        made.tool_output_guardrails = [
            ToolOutputGuardrail(self.tool_check(guardrail, lambda data: str(data.output)), guardrail["name"])
            for guardrail in at_this
            if guardrail["stage"] == "TOOL_OUTPUT"
        ]
        return made

    def extractor(self, key):
        """A structured output goes on as the text that it was, not as Python writes a value."""

        async def text(result):
            return final_text(result)

        return text if self.scenario["agents"][key].get("outputSchema") is not None else None

    def webhook(self, fields):
        name = fields["name"]
        schema = fields.get("parameters") or {"type": "object", "properties": {}}
        validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))

        async def post(arguments):
            value = json.loads(arguments)
            if not isinstance(value, dict):
                raise ModelBehaviorError("the arguments are no object")
            validator.validate(value)
            answer = await http().post(f"{self.tools_url}/{name}", content=arguments.encode())
            answer.raise_for_status()
            return answer.text

        async def call(context, arguments):
            try:
                return await post(arguments or "{}")
            except Exception as error:
                # As the decorator `function_tool` has it.
                return default_tool_error_function(context, error)

        timeout = fields.get("timeoutMs")
        return FunctionTool(
            name=name,
            description=fields["description"],
            params_json_schema=json.loads(json.dumps(schema)),
            on_invoke_tool=call,
            needs_approval=fields.get("needsApproval", False),
            timeout_seconds=timeout / 1000 if timeout else None,
        )

    def handoff(self, item):
        kind = item.get("inputFilter", "NONE")
        filters = {
            "NONE": None,
            "REMOVE_TOOLS": remove_all_tools,
        }
        return handoff(
            self.agents[item["agent"]],
            tool_name_override=item.get("toolName"),
            tool_description_override=item.get("toolDescription"),
            input_filter=filters[kind],
            nest_handoff_history=item.get("nestHistory", False),
        )

    def add_guardrails(self, agent, definition):
        for guardrail in definition.get("guardrails", []):
            name, stage = guardrail["name"], guardrail["stage"]
            if stage == "INPUT":

                async def check_input(context, _agent, given, guardrail=guardrail):
                    return await self.check(guardrail, context, last_text(given))

                parallel = guardrail.get("parallel", False)
                agent.input_guardrails.append(InputGuardrail(check_input, name, run_in_parallel=parallel))
            elif stage == "OUTPUT":

                async def check_output(context, _agent, output, guardrail=guardrail):
                    return await self.check(guardrail, context, as_text(output))

                agent.output_guardrails.append(OutputGuardrail(check_output, name))

    async def check(self, guardrail, context, text):
        tripped, reason = await self.judge(guardrail["rule"], context, text)
        return GuardrailFunctionOutput(output_info=reason, tripwire_triggered=tripped)

    def tool_check(self, guardrail, look):
        async def check(data):
            tripped, reason = await self.judge(guardrail["rule"], data.context, look(data))
            if not tripped:
                return ToolGuardrailFunctionOutput.allow()
            if guardrail.get("onTrip") == "FAIL":
                return ToolGuardrailFunctionOutput.raise_exception(reason)
            return ToolGuardrailFunctionOutput.reject_content(guardrail["message"], reason)

        return check

    async def judge(self, rule, context, text):
        ((kind, value),) = rule.items()
        if kind == "regex":
            matches = re.search(value["pattern"], text) is not None
            return matches == value.get("tripOnMatch", True), None
        if kind == "maxLength":
            return len(text) > value, None
        if kind == "jsonSchema":
            try:
                jsonschema.validate(json.loads(text), value)
                return False, None
            except (ValueError, jsonschema.ValidationError):
                return True, None
        result = await Runner.run(self.agents[value], text, run_config=RunConfig(tracing_disabled=True))
        # As the SDK's examples of guardrails do it, with what it cost counted.
        context.usage.add(result.context_wrapper.usage)
        return result.final_output["tripped"], result.final_output["reason"]

    async def all_runs(self):
        runs = self.scenario["runs"]
        session = SQLiteSession("differential") if len(runs) > 1 else None
        return [await self.one_run(run, session) for run in runs]

    async def one_run(self, run, session):
        self.variables = run.get("variables", {})
        given, pauses, decided, streamed = run["input"], [], 0, ""
        while True:
            outcome, error, text = await self.go(given, session)
            streamed += text
            pending = [] if error else outcome.interruptions
            if not pending:
                break
            decisions = decisions_at(run, len(pauses), [call_id(item.raw_item) for item in pending], decided)
            pauses.append([pending_call(item) for item in pending])
            if decisions is None:
                break
            decided += len(decisions)
            given = outcome.to_state()
            for decision in decisions:
                decide(given, pending, decision)
            if run.get("restart"):
                given = await RunState.from_json(self.start, json.loads(json.dumps(given.to_json())))
        return {
            "output": None if error or pending else final_text(outcome),
            "json": None if error or pending or outcome.last_agent.output_type is None else outcome.final_output,
            "error": error,
            "agent": outcome.last_agent.name if outcome else None,
            "items": [item for item in map(neutral_item, outcome.new_items) if item] if outcome else None,
            "usage": neutral_usage(outcome.context_wrapper.usage) if outcome else None,
            "pauses": pauses,
            "streamed": streamed if self.scenario.get("stream") else None,
        }

    async def go(self, given, session):
        """The result, or what an exception knows of it; the error; the text that was streamed."""
        options = {
            "session": session,
            "max_turns": self.scenario["agents"][self.start_key()].get("maxTurns", DEFAULT_MAX_TURNS),
            "run_config": RunConfig(
                tracing_disabled=True,
                # What runs.md marks as different on purpose.
                tool_not_found_behavior="return_error_to_model",
                tool_execution=ToolExecutionConfig(
                    max_function_tool_concurrency=self.scenario["agents"][self.start_key()].get("maxToolConcurrency")
                ),
            ),
        }
        text, result = "", None
        try:
            if not self.scenario.get("stream"):
                return await Runner.run(self.start, given, **options), None, text
            result = Runner.run_streamed(self.start, given, **options)
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
            return result, None, text
        except (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered) as error:
            code, name = "GUARDRAIL", error.guardrail_result.guardrail.get_name()
            caught = error
        except (ToolInputGuardrailTripwireTriggered, ToolOutputGuardrailTripwireTriggered) as error:
            code, name = "GUARDRAIL", error.guardrail.get_name()
            caught = error
        except MaxTurnsExceeded as error:
            code, name, caught = "MAX_TURNS", None, error
        except ModelRefusalError as error:
            code, name, caught = "MODEL_REFUSAL", None, error
        except ModelBehaviorError as error:
            code, name, caught = "MODEL_BEHAVIOR", None, error
        except openai.APIStatusError as error:
            code = "MODEL_UNAVAILABLE" if error.status_code >= 500 else "MODEL_REJECTED"
            name, caught = None, error
        return getattr(caught, "run_data", None) or result, {"code": code, "guardrail": name}, text

    def start_key(self):
        return next(key for key, agent in self.agents.items() if agent is self.start)


def settings(given, stream):
    effort = given.get("reasoningEffort")
    return ModelSettings(
        temperature=given.get("temperature"),
        top_p=given.get("topP"),
        max_tokens=given.get("maxOutputTokens"),
        tool_choice=given.get("toolChoice"),
        parallel_tool_calls=given.get("parallelToolCalls"),
        reasoning=Reasoning(effort=effort.lower()) if effort else None,
        # Streams tell their usage only when they are asked to.
        include_usage=True if stream else None,
    )


def hosted(name, config):
    if name == "web_search":
        return WebSearchTool(**config)
    of_name = {"code_interpreter": CodeInterpreterTool, "image_generation": ImageGenerationTool}
    return of_name[name](tool_config={"type": name, **config})


def decisions_at(run, pause, pending, decided):
    """As `Run::decisions_at`."""
    in_turn = run.get("decideInTurn")
    if not in_turn:
        given = run.get("decisions", [])
        return given[pause] if pause < len(given) else None
    decisions = []
    for at, call in enumerate(sorted(pending)):
        decision = in_turn[(decided + at) % len(in_turn)]
        decisions.append({**decision, "call": call, "always": decision.get("always", False) and len(pending) == 1})
    return decisions


def decide(state, pending, decision):
    item = next(item for item in pending if call_id(item.raw_item) == decision["call"])
    always = decision.get("always", False)
    if decision["approve"]:
        state.approve(item, always_approve=always)
    else:
        state.reject(item, always_reject=always, rejection_message=decision.get("message"))


def pending_call(item):
    raw = as_dict(item.raw_item)
    return {"call": raw["call_id"], "name": raw["name"], "arguments": raw["arguments"]}


def as_dict(raw):
    return raw if isinstance(raw, dict) else raw.model_dump()


def call_id(raw):
    return as_dict(raw)["call_id"]


def neutral_item(item):
    raw, agent = as_dict(item.raw_item), item.agent.name
    if item.type == "message_output_item":
        text = "".join(part.get("text") or "" for part in raw["content"])
        return {"kind": "message", "agent": agent, "text": text}
    if item.type == "reasoning_item":
        parts = raw.get("content") or raw.get("summary") or []
        return {"kind": "reasoning", "agent": agent, "text": "".join(part["text"] for part in parts)}
    if item.type in ("tool_call_item", "handoff_call_item") and raw["type"] == "function_call":
        call = {"call": raw["call_id"], "name": raw["name"], "arguments": raw["arguments"]}
        return {"kind": "call", "agent": agent, **call}
    if item.type == "tool_call_item":
        return {"kind": "hosted_call", "agent": agent, "call": raw["id"], "name": raw["type"]}
    if item.type == "tool_call_output_item":
        return {"kind": "output", "agent": agent, "call": raw["call_id"], "output": str(item.output)}
    if item.type == "handoff_output_item":
        to = item.target_agent.name
        return {"kind": "handoff", "agent": item.source_agent.name, "call": raw["call_id"], "to": to}
    # Waiting for a decision is no step of the transcript; the pauses have it.
    assert item.type == "tool_approval_item", item.type
    return None


def neutral_usage(usage):
    return {
        "requests": usage.requests,
        "input": usage.input_tokens,
        "output": usage.output_tokens,
        "cached": usage.input_tokens_details.cached_tokens,
        "reasoning": usage.output_tokens_details.reasoning_tokens,
        "total": usage.total_tokens,
    }


def as_text(output):
    if isinstance(output, str):
        return output
    return json.dumps(output, ensure_ascii=False)


def final_text(result):
    """The final text: of a structured output what the model wrote."""
    if isinstance(result.final_output, str) and result.last_agent.output_type is None:
        return result.final_output
    last = result.new_items[-1]
    return ItemHelpers.text_message_output(last) if last.type == "message_output_item" else as_text(result.final_output)


def last_text(given):
    """The user's text: with a session, the last of the input."""
    if isinstance(given, str):
        return given
    return next(item["content"] for item in reversed(given) if item.get("role") == "user")


async def play(line, out):
    request = json.loads(line)
    answer = {"id": request["id"]}
    try:
        answer["runs"] = await Play(request).all_runs()
    except Exception:
        answer["error"] = traceback.format_exc()
    out.write(json.dumps(answer) + "\n")
    out.flush()


async def main():
    set_tracing_disabled(True)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr
    playing = set()
    while line := await reader.readline():
        task = loop.create_task(play(line, out))
        playing.add(task)
        task.add_done_callback(playing.discard)


asyncio.run(main())
