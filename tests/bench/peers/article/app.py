"""The stack of the article that Cloister began from, as a fair peer.

FastAPI, SQLAlchemy (async) and the OpenAI Agents SDK: an API key is looked up by its hash, the month's quota is the
sum of the usage rows, one agent runs, and what it used is written down. `POST /v1/run {agent_id, message}` answers
`{response, tokens_used, model}`, as Cloister's does.

Configured by the environment: `DATABASE_URL` (`postgresql+asyncpg://...` or `sqlite+aiosqlite:///...`),
`OPENAI_BASE_URL` and `OPENAI_API_KEY`. `python app.py KEY` makes the tables, and a tenant with this key and an agent;
it prints the agent's id. The SDK's tracing is off: it would call out.
"""

import asyncio
import hashlib
import os
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

from agents import Agent as SdkAgent
from agents import OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from fastapi import Depends, FastAPI, Header, HTTPException
from openai import AsyncOpenAI
from pydantic import BaseModel
from sqlalchemy import BigInteger, DateTime, ForeignKey, Index, event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = os.environ["DATABASE_URL"]
MODEL = "scripted-1"

set_tracing_disabled(True)
openai = AsyncOpenAI()

if URL.startswith("sqlite"):
    engine = create_async_engine(URL, pool_size=16, connect_args={"timeout": 30})

    @event.listens_for(engine.sync_engine, "connect")
    def use_wal(connection, _record):
        """The settings that Cloister uses: readers beside the writer, no wait for the disk at each commit."""
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()
else:
    engine = create_async_engine(URL, pool_size=16, max_overflow=16)
session_of = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """All tables."""


class Tenant(Base):
    __tablename__ = "tenants"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str]
    monthly_token_limit: Mapped[int] = mapped_column(BigInteger)
    is_active: Mapped[bool] = mapped_column(default=True)


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    key_hash: Mapped[str] = mapped_column(unique=True)
    is_active: Mapped[bool] = mapped_column(default=True)


class Agent(Base):
    __tablename__ = "agents"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    model: Mapped[str]
    instructions: Mapped[str]


class UsageRecord(Base):
    __tablename__ = "usage_records"
    __table_args__ = (Index("usage_of_month", "tenant_id", "created_at"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    agent_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("agents.id"))
    model: Mapped[str]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    total_tokens: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class RunRequest(BaseModel):
    """A run to be done now."""

    agent_id: uuid.UUID
    message: str


class RunResponse(BaseModel):
    """What came of it."""

    response: str
    tokens_used: int
    model: str


async def database() -> AsyncIterator[AsyncSession]:
    async with session_of() as session:
        yield session


Database = Annotated[AsyncSession, Depends(database)]


async def caller(session: Database, x_api_key: Annotated[str, Header()]) -> Tenant:
    """The tenant that the key belongs to."""
    hashed = hashlib.sha256(x_api_key.encode()).hexdigest()
    query = (
        select(Tenant)
        .join(ApiKey, ApiKey.tenant_id == Tenant.id)
        .where(ApiKey.key_hash == hashed, ApiKey.is_active, Tenant.is_active)
    )
    tenant = await session.scalar(query)
    if tenant is None:
        raise HTTPException(401, "Invalid API key")
    return tenant


async def check_quota(session: AsyncSession, tenant: Tenant) -> None:
    """Refuses a tenant that has used its month."""
    now = datetime.now(UTC)
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    used = func.coalesce(func.sum(UsageRecord.total_tokens), 0)
    query = select(used).where(UsageRecord.tenant_id == tenant.id, UsageRecord.created_at >= month)
    if await session.scalar(query) >= tenant.monthly_token_limit:
        raise HTTPException(429, "Monthly token limit exceeded")


app = FastAPI()


@app.post("/v1/run")
async def run(request: RunRequest, session: Database, tenant: Annotated[Tenant, Depends(caller)]) -> RunResponse:
    await check_quota(session, tenant)
    agent = await session.scalar(select(Agent).where(Agent.id == request.agent_id, Agent.tenant_id == tenant.id))
    if agent is None:
        raise HTTPException(404, "Agent not found")
    model = OpenAIChatCompletionsModel(model=agent.model, openai_client=openai)
    result = await Runner.run(SdkAgent(name=agent.name, instructions=agent.instructions, model=model), request.message)
    usage = result.context_wrapper.usage
    session.add(
        UsageRecord(
            tenant_id=tenant.id,
            agent_id=agent.id,
            model=agent.model,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            total_tokens=usage.total_tokens,
            created_at=datetime.now(UTC),
        )
    )
    await session.commit()
    return RunResponse(response=result.final_output, tokens_used=usage.total_tokens, model=agent.model)


async def prepare(key: str) -> None:
    """Makes the tables, a tenant with this key, and its agent; prints the agent's id."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with session_of() as session:
        tenant = Tenant(name="Bench", monthly_token_limit=1_000_000_000_000)
        session.add(tenant)
        await session.flush()
        agent = Agent(tenant_id=tenant.id, name="Agent", model=MODEL, instructions="Be brief.")
        hashed = hashlib.sha256(key.encode()).hexdigest()
        session.add_all([agent, ApiKey(tenant_id=tenant.id, key_hash=hashed)])
        await session.commit()
        print(agent.id)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(prepare(sys.argv[1]))
