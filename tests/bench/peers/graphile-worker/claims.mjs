// Claims and finishes no-op jobs, unbatched, and prints `{"jobs": N, "seconds": S}`.
// Usage: node claims.mjs POSTGRES_URL JOBS CONCURRENCY
//
// Unbatched: a job is claimed by one statement and completed by another, as the library does out of the box.
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import pg from "pg";

const [url, jobs, concurrency] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
// A connection a worker, and a few for the library itself.
const pool = new pg.Pool({ connectionString: url, max: concurrency + 4 });
const logger = new Logger(() => () => {});

const utils = await makeWorkerUtils({ pgPool: pool, logger });
await utils.migrate();
await pool.query("SELECT graphile_worker.add_job('noop') FROM generate_series(1, $1::int)", [jobs]);
await pool.query("VACUUM ANALYZE");

let done = 0;
let allDone;
const finished = new Promise((resolve) => (allDone = resolve));
const begun = process.hrtime.bigint();
const runner = await run({
  pgPool: pool,
  logger,
  noHandleSignals: true,
  preset: {
    worker: {
      concurrentJobs: concurrency,
      localQueue: { size: -1 },
      completeJobBatchDelay: -1,
      failJobBatchDelay: -1,
    },
  },
  taskList: { noop: () => {} },
});
runner.events.on("job:complete", () => {
  done += 1;
  if (done === jobs) allDone();
});
await finished;
const seconds = Number(process.hrtime.bigint() - begun) / 1e9;
await runner.stop();
const left = await pool.query("SELECT count(*)::int AS jobs FROM graphile_worker.jobs");
await utils.release();
await pool.end();
if (left.rows[0].jobs !== 0) throw new Error(`${left.rows[0].jobs} jobs are left`);
console.log(JSON.stringify({ jobs, seconds }));
