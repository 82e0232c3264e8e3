"""The SDK's own loop: runs of an agent with a tool, again and again, each as many turns as the message asks the model for.

    python loop.py MESSAGE CLIENTS WARM_UP_SECONDS SECONDS

Prints `{"runs", "seconds", "cpu_ms"}`: runs ended in the measured time, and the process's own processor time in it.
"""

import asyncio
import json
import os
import resource
import sys
import time

import openai
from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled


@function_tool
def look() -> str:
    """Looks."""
    return "ok"


def cpu_ms():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1000


async def main(message, clients, warm_up, seconds):
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="-", max_retries=0)
    model = OpenAIChatCompletionsModel(model="scripted-1", openai_client=client)
    agent = Agent(name="Agent", instructions="Be brief.", model=model, tools=[look])
    begin = time.perf_counter() + warm_up
    end = begin + seconds
    ended = 0

    async def again_and_again():
        nonlocal ended
        while time.perf_counter() < end:
            await Runner.run(agent, message, max_turns=100)
            if begin <= time.perf_counter() < end:
                ended += 1

    async def processor_time():
        await asyncio.sleep(warm_up)
        before = cpu_ms()
        await asyncio.sleep(seconds)
        return cpu_ms() - before

    used, *_ = await asyncio.gather(processor_time(), *(again_and_again() for _ in range(clients)))
    print(json.dumps({"runs": ended, "seconds": seconds, "cpu_ms": used}))


asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
