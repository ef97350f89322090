"""Send, and handle in order by session: run it as ``python quickstart.py``."""

import asyncio

from queue_runtime import Consumer, Message, QueueClient, ReceivedMessage


async def main() -> None:
    async with QueueClient("memory://") as client:
        for number in range(6):
            await client.send_message("orders", Message(body=b"step %d" % number, session_id=f"order-{number % 2}"))

        async def handle(message: ReceivedMessage) -> None:
            print(message.session_id, message.body.decode())
            done.append(message)
            if len(done) == 6:
                consumer.stop()

        done: list[ReceivedMessage] = []
        consumer = Consumer(client, "orders", handle)
        stats = await consumer.run()
        print(f"{stats.completed} completed in {stats.sessions} sessions")


asyncio.run(main())
