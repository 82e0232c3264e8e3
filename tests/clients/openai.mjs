// Makes one call with the official openai client and prints what the client makes of it:
//   {"model":{…}} per listed model | {"chunk":{…}} per streamed chunk | {"completion":{…}} for an answer in one piece |
//   {"event":{…}} per event of a streamed response, then {"final":{…}} | {"response":{…}} for a response in one piece,
// then {"complete":true} or {"error":{"class":"RateLimitError","status":429,…}}
// Argument: {baseURL, apiKey, call: "models" | "chat" | "stream" | "response" | "responseStream", body?, maxRetries?}
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
  async response(client, body, print) {
    print({ response: await client.responses.create(body) });
  },
  async responseStream(client, body, print) {
    const stream = client.responses.stream(body);
    for await (const event of stream) print({ event });
    print({ final: await stream.finalResponse() });
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
