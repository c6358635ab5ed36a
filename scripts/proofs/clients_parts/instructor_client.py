"""Instructor: its modes of structured output."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field
from tried import BASE, MODEL, QUESTION, tried


class City(BaseModel):
    name: str
    country: str
    population: int = Field(ge=0, le=50_000_000)


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="none"), mode=mode)
    tried(
        mode.name,
        lambda client=client: client.chat.completions.create(
            model=MODEL,
            response_model=City,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=96,
            temperature=0,
            max_retries=1,
        ),
    )
