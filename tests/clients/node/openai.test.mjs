// The official OpenAI SDK for JavaScript: it changes `baseURL` and nothing else.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { baseURL, mask, photo, sizeOf, sizeOfText } from './pictures.mjs';

const client = new OpenAI({ baseURL, apiKey: 'unused', maxRetries: 0 });
const few = { steps: 4, seed: 1 };

test('generate by URL', async () => {
  const answer = await client.images.generate({ model: 'dall-e-2', prompt: 'a cat', n: 2, size: '64x64', ...few });
  assert.equal(answer.data.length, 2);
  for (const item of answer.data) {
    assert.equal(item.b64_json, undefined);
    const file = await fetch(item.url);
    assert.deepEqual(sizeOf(await file.arrayBuffer()), [64, 64]);
  }
});

test('generate by base64, with all that GPT image clients send', async () => {
  const answer = await client.images.generate({
    model: 'gpt-image-1',
    prompt: 'a cat',
    background: 'auto',
    moderation: 'low',
    output_format: 'png',
    quality: 'low',
    size: 'auto',
    ...few,
  });
  assert.deepEqual(sizeOfText(answer.data[0].b64_json), [128, 128]);
  assert.equal(answer.data[0].url, undefined);
  assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
});

test('a stream shows previews, then the picture', async () => {
  const stream = await client.images.generate({
    model: 'gpt-image-1',
    prompt: 'a cat',
    stream: true,
    partial_images: 2,
    ...few,
  });
  const events = [];
  for await (const event of stream) events.push(event);
  assert.deepEqual(
    events.map((event) => [event.type, event.partial_image_index]),
    [
      ['image_generation.partial_image', 0],
      ['image_generation.partial_image', 1],
      ['image_generation.completed', undefined],
    ],
  );
  for (const event of events) assert.deepEqual(sizeOfText(event.b64_json), [128, 128]);
  assert.ok(events.at(-1).usage.total_tokens > 0);
});

test('edit a file under a mask', async () => {
  const answer = await client.images.edit({
    model: 'gpt-image-1',
    image: await toFile(photo, 'photo.png', { type: 'image/png' }),
    mask: await toFile(mask, 'mask.png', { type: 'image/png' }),
    prompt: 'a cat',
    n: 2,
    input_fidelity: 'high',
    ...few,
  });
  assert.equal(answer.data.length, 2);
  for (const item of answer.data) assert.deepEqual(sizeOfText(item.b64_json), [128, 128]);
});

test('edit a list of files, streamed', async () => {
  const stream = await client.images.edit({
    model: 'gpt-image-1',
    image: [await toFile(photo, 'photo.png', { type: 'image/png' })],
    prompt: 'a cat',
    stream: true,
    partial_images: 1,
    ...few,
    strength: 1,
  });
  const types = [];
  for await (const event of stream) types.push(event.type);
  assert.deepEqual(types, ['image_edit.partial_image', 'image_edit.completed']);
});

test('models', async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes('sfumato-tiny'));
  assert.equal((await client.models.retrieve('sfumato-tiny')).object, 'model');
});

test('errors have a class, a field and an id', async () => {
  await assert.rejects(client.images.generate({ model: 'sfumato-tiny', prompt: 'a cat', size: 'abc' }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, 'size');
    assert.equal(error.type, 'invalid_request_error');
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.images.generate({ model: 'no-such', prompt: 'a cat' }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, 'model_not_found');
    return true;
  });
});

test('chat answers with a picture, which is the source of the next', async () => {
  const messages = [{ role: 'user', content: 'a cat on a green background' }];
  const answer = await client.chat.completions.create({ model: 'sfumato-tiny', messages, ...few });
  const { message } = answer.choices[0];
  assert.deepEqual(sizeOfText(message.images[0].image_url.url.split(',')[1]), [128, 128]);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  messages.push(message, { role: 'user', content: 'now make it blue' });
  const again = await client.chat.completions.create({ model: 'sfumato-tiny', messages, ...few, content_images: true });
  assert.ok(again.usage.prompt_tokens_details.image_tokens > 0);
  const url = /!\[now make it blue\]\((.*)\)/.exec(again.choices[0].message.content)[1];
  assert.deepEqual(sizeOf(await (await fetch(url)).arrayBuffer()), [128, 128]);
});

test('chat streams', async () => {
  const stream = await client.chat.completions.create({
    model: 'sfumato-tiny',
    messages: [{ role: 'user', content: 'a cat' }],
    stream: true,
    ...few,
  });
  const images = [];
  let reason;
  for await (const chunk of stream) {
    images.push(...(chunk.choices[0].delta.images ?? []));
    reason = chunk.choices[0].finish_reason;
  }
  assert.equal(reason, 'stop');
  assert.deepEqual(sizeOfText(images[0].image_url.url.split(',')[1]), [128, 128]);
});

test('chat says what OpenAI says of a model that is not there', async () => {
  const messages = [{ role: 'user', content: 'hello' }];
  await assert.rejects(client.chat.completions.create({ model: 'gpt-4o', messages }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, 'model_not_found');
    return true;
  });
});
