// The Vercel AI SDK: text, stream, an object by schema, whole and streamed, a tool, the Responses API.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { tried } from "./tried.mjs";

const openai = createOpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: "none" });
const model = openai.chat(process.env.MODEL);
const schema = z.object({ name: z.string(), country: z.string(), population: z.number().int().min(0).max(50_000_000) });
const question = "Give me a JSON record of the city of Paris: name, country, population.";

await tried("generateText", async () => (await generateText({ model, prompt: "Say hello.", maxOutputTokens: 32 })).text);
await tried("streamText", async () => {
  let text = "";
  for await (const piece of streamText({ model, prompt: "Say hello.", maxOutputTokens: 32 }).textStream) text += piece;
  return text;
});
await tried("generateObject", async () =>
  JSON.stringify((await generateObject({ model, schema, prompt: question, maxOutputTokens: 96, temperature: 0 })).object),
);
await tried("streamObject", async () => {
  const streamed = streamObject({ model, schema, prompt: question, maxOutputTokens: 96, temperature: 0 });
  let last;
  for await (const part of streamed.partialObjectStream) last = part;
  return JSON.stringify(last);
});
await tried("tools, required", async () => {
  const tools = { city: tool({ description: "Note a city.", inputSchema: schema }) };
  const answer = await generateText({ model, tools, toolChoice: "required", prompt: question, maxOutputTokens: 96 });
  return JSON.stringify(answer.toolCalls.map((call) => call.input));
});
await tried("responses", async () => {
  const responses = openai(process.env.MODEL);
  return (await generateText({ model: responses, prompt: "Say hello.", maxOutputTokens: 32 })).text;
});
