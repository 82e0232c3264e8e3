// Runs one operation with graphql-ws and prints each result as a line, then how it ended:
//   {"complete":true} | {"errors":[…]} | {"close":{"code":…,"reason":…}} | {"error":"…"}
// Argument: {url, connectionParams?, query, variables?, operationName?, retryAttempts?}
import { createClient } from 'graphql-ws';
import WebSocket from 'ws';
import { run } from './lines.mjs';

await run(async ({ url, connectionParams, query, variables, operationName, retryAttempts = 0 }, print) => {
  const client = createClient({
    url,
    connectionParams,
    webSocketImpl: WebSocket,
    retryAttempts,
    on: { connected: () => print({ connected: true }) },
  });
  await new Promise((ended) => {
    client.subscribe(
      { query, variables, operationName },
      {
        next: print,
        complete: () => ended({ complete: true }),
        error: (cause) => {
          if (Array.isArray(cause)) ended({ errors: cause });
          else if (typeof cause?.code === 'number') ended({ close: { code: cause.code, reason: cause.reason } });
          else ended({ error: String(cause?.message ?? cause) });
        },
      },
    );
  }).then(print);
});
