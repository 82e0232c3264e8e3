"""How fast the SDK's own loop is: runs of one agent with one tool, against a model server that decides how many turns.

    python loop_speed.py BASE_URL --model scripted-1 --runs 200 --at-once 16

Prints one JSON object: `{"runs", "at_once", "seconds", "runs_per_second"}`.
"""

import argparse
import asyncio
import json
import time

import openai
from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool, set_tracing_disabled


@function_tool
def look() -> str:
    """Looks."""
    return "ok"


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_url")
    parser.add_argument("--model", default="scripted-1")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--max-turns", type=int, default=21)
    given = parser.parse_args()
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=given.base_url, api_key="test-key", max_retries=0)
    model = OpenAIChatCompletionsModel(model=given.model, openai_client=client)
    agent = Agent(name="Ada", instructions="Be brief.", model=model, tools=[look])
    gate = asyncio.Semaphore(given.at_once)

    async def run():
        async with gate:
            config = RunConfig(tracing_disabled=True)
            await Runner.run(agent, "Go", max_turns=given.max_turns, run_config=config)

    # The first run loads what is loaded late.
    await run()
    begun = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(given.runs)))
    seconds = time.perf_counter() - begun
    told = {"runs": given.runs, "at_once": given.at_once, "seconds": round(seconds, 3)}
    print(json.dumps({**told, "runs_per_second": round(given.runs / seconds, 2)}))


asyncio.run(main())
