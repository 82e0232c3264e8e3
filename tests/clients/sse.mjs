// Runs one operation with graphql-sse in distinct connections mode and prints each result as a line, then how it ended:
//   {"complete":true} | {"status":401,"body":"…"} | {"error":"…"}
// Argument: {url, headers?, query, variables?, operationName?, retryAttempts?}
import { createClient } from 'graphql-sse';
import { run } from './lines.mjs';

await run(async ({ url, headers, query, variables, operationName, retryAttempts = 0 }, print) => {
  const client = createClient({
    url,
    headers,
    singleConnection: false,
    retryAttempts,
    on: { connected: () => print({ connected: true }) },
  });
  const ending = await new Promise((ended) => {
    client.subscribe(
      { query, variables, operationName },
      {
        next: print,
        complete: () => ended({ complete: true }),
        error: (cause) => ended({ cause }),
      },
    );
  });
  const response = ending.cause?.response;
  if (response) print({ status: response.status, body: await response.text().catch(() => '') });
  else if (ending.cause) print({ error: String(ending.cause.message ?? ending.cause) });
  else print(ending);
});
