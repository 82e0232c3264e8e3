// Makes one call with the official openai client and prints what the client makes of it:
//   {"model":{…}} per listed model | {"chunk":{…}} per streamed chunk | {"completion":{…}} for an answer in one piece,
// then {"complete":true} or {"error":{"class":"RateLimitError","status":429,…}}
// Argument: {baseURL, apiKey, call: "models" | "chat" | "stream", body?, maxRetries?}
import OpenAI from 'openai';
import { run } from './lines.mjs';

const calls = {
  async models(client, _, print) {
    for await (const model of client.models.list()) print({ model });
  },
  async chat(client, body, print) {
    print({ completion: await client.chat.completions.create(body) });
  },
  async stream(client, body, print) {
    for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) print({ chunk });
  },
};

await run(async ({ baseURL, apiKey, call, body, maxRetries = 0 }, print) => {
  const client = new OpenAI({ baseURL, apiKey, maxRetries });
  try {
    await calls[call](client, body, print);
    print({ complete: true });
  } catch (cause) {
    const { status, code, type, param, requestID, message } = cause;
    const retryAfter = cause.headers?.get?.('retry-after');
    print({ error: { class: cause.constructor.name, status, code, type, param, requestID, retryAfter, message } });
  }
});
