// Anthropic's client of Node: messages, a stream, a tool.
import Anthropic from "@anthropic-ai/sdk";
import { tried } from "./tried.mjs";

const client = new Anthropic({ baseURL: process.env.URL, apiKey: "none" });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model: process.env.MODEL, max_tokens: 48, temperature: 0, messages };
const schema = { type: "object", properties: { name: { type: "string", maxLength: 20 } }, required: ["name"] };

await tried("messages", async () => (await client.messages.create(asked)).content[0].text);
await tried("stream", async () => await client.messages.stream(asked).finalText());
await tried("tools", async () => {
  const tools = [{ name: "greet", description: "Greet somebody.", input_schema: schema }];
  const answer = await client.messages.create({ ...asked, tools, tool_choice: { type: "any" } });
  return JSON.stringify(answer.content);
});
await tried("countTokens", async () => {
  const counted = await client.messages.countTokens({ model: process.env.MODEL, messages });
  return counted.input_tokens;
});
