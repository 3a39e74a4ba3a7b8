// The Vercel AI SDK, by its provider for compatible servers and by its own OpenAI provider.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateImage } from 'ai';
import { baseURL, mask, photo, sizeOf } from './pictures.mjs';

const sfumato = createOpenAICompatible({ name: 'sfumato', baseURL });
const openai = createOpenAI({ baseURL, apiKey: 'unused' });
const few = { steps: 4, seed: 1 };

test('text, n and size', async () => {
  const { images, warnings } = await generateImage({
    model: sfumato.imageModel('sfumato-tiny'),
    prompt: 'a cat',
    n: 2,
    size: '64x64',
    providerOptions: { sfumato: few },
  });
  assert.deepEqual(warnings, []);
  assert.deepEqual(images.map((image) => sizeOf(image.uint8Array)), [[64, 64], [64, 64]]);
  assert.equal(images[0].mediaType, 'image/png');
});

test('provider options reach the model', async () => {
  const draw = async (options) => {
    const { image } = await generateImage({
      model: sfumato.imageModel('sfumato-tiny'),
      prompt: 'a cat',
      providerOptions: { sfumato: { ...few, ...options } },
    });
    return image.base64;
  };
  const first = await draw({});
  assert.equal(await draw({}), first);
  assert.notEqual(await draw({ seed: 2 }), first);
});

test('edits, which name no response format', async () => {
  const { image } = await generateImage({
    model: sfumato.imageModel('sfumato-tiny'),
    prompt: { images: [photo], text: 'a cat' },
    providerOptions: { sfumato: few },
  });
  assert.deepEqual(sizeOf(image.uint8Array), [128, 128]);
});

test('edits with a mask', async () => {
  const { image } = await generateImage({
    model: sfumato.imageModel('sfumato-tiny'),
    prompt: { images: [photo], text: 'a cat', mask },
    providerOptions: { sfumato: few },
  });
  assert.deepEqual(sizeOf(image.uint8Array), [128, 128]);
});

test('the OpenAI provider, which takes base64 alone', async () => {
  const { image, usage } = await generateImage({
    model: openai.image('gpt-image-1'),
    prompt: 'a cat',
    size: '64x64',
    providerOptions: { openai: { quality: 'low', background: 'opaque', outputFormat: 'png', moderation: 'low' } },
  });
  assert.deepEqual(sizeOf(image.uint8Array), [64, 64]);
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
  const edited = await generateImage({
    model: openai.image('gpt-image-1'),
    prompt: { images: [photo], text: 'a cat' },
    providerOptions: { openai: { quality: 'low', inputFidelity: 'high' } },
  });
  assert.deepEqual(sizeOf(edited.image.uint8Array), [128, 128]);
});

test('an error carries our message and is not sent again', async () => {
  await assert.rejects(
    generateImage({ model: sfumato.imageModel('no-such'), prompt: 'a cat', maxRetries: 2 }),
    (error) => {
      assert.ok(APICallError.isInstance(error), String(error));
      assert.equal(error.statusCode, 404);
      assert.match(error.message, /sfumato-tiny/);
      return true;
    },
  );
});
